"""The trackers' sinks: small, and clear about what is not installed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from distcomp import DistcompError, integrations

SINKS = {"wandb": "WandB", "mlflow": "MLflow", "trackio": "Trackio", "aim": "Aim"}
MOST_LINES = 40


@pytest.mark.parametrize("name", SINKS)
def test_a_tracker_that_is_missing_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = getattr(importlib.import_module(f"distcomp.integrations.{name}"), SINKS[name])
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    arguments = ("folder",) if name == "aim" else ()
    with pytest.raises(DistcompError, match=rf"{name} is not installed.*distcomp\[{name}\]"):
        sink(*arguments)


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_is_small(name: str) -> None:
    text = (Path(integrations.__file__).parent / f"{name}.py").read_text()
    code = [line for line in text.splitlines() if line.strip()]
    assert len(code) <= MOST_LINES
