"""What every test shares: one thread, and properties that try the same examples every time."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

import distcomp.public  # noqa: F401  (METHODS knows them all)

torch.set_num_threads(1)

settings.register_profile(
    "distcomp",
    deadline=None,  # the machine may be busy; no test asserts a time
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("distcomp")
