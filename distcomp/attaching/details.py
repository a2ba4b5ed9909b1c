"""A closer look at one iteration in many: what compression left out of each parameter, and what is owed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import Method, cut_state
from distcomp.methods.feedback import owed
from distcomp.recording import DETAIL_EVERY
from distcomp.runtime.aggregation import Aggregation
from distcomp.runtime.pipeline import Timeline


def cadence() -> int:
    """Every how many iterations a closer look is recorded; 0: never. Raises DistcompError for no number."""
    text = os.environ.get(DETAIL_EVERY) or "0"
    if not text.isdecimal():
        raise DistcompError(f"{DETAIL_EVERY} is {text!r}; give a number of steps, such as 50, or 0 for never")
    return int(text)


@torch.no_grad()
def looked_at(aggregation: Aggregation, x: Tensor, method: Method, size: int) -> dict[str, Any]:
    """By parameter: how many numbers, the bytes that the method declares for it alone, the norms of its
    gradient and of what is owed after the step, and the compression error ``|v - C(v)| / |v|``, where ``v``
    is what was to be sent: the gradient and what was owed before. A number that is not finite is None."""
    result, layout = aggregation.finished(), aggregation.layout
    wanted = x + owed(cut_state(aggregation.before), layout, x)
    left = wanted - result.contribution()
    remains = owed(cut_state(result.state), layout, x)
    norms = [[float(piece.norm()) for _, piece in layout.pieces(one)] for one in (x, wanted, left, remains)]
    return {
        param.name: {
            "numel": param.numel,
            "payload_bytes": method.payload_bytes(Layout((param,)), size, aggregation.step),
            "gradient_norm": _finite(gradient),
            "residual_norm": _finite(later),
            "error": _finite(missing / whole if whole else 0.0),
        }
        for param, gradient, whole, missing, later in zip(layout.slices, *norms, strict=True)
    }


def spans_of(timeline: Timeline, ready_s: float) -> Mapping[str, Any]:
    """When what was done, in seconds from the first moment: ``[phase, bucket, round, begin, end]``."""
    spans = [one for one in timeline.spans if one.begin_s > 0]  # what never began has no moment
    if not spans:
        return {"spans": [], "ready_s": None}
    first_s = min(one.begin_s for one in spans)
    return {
        "spans": [
            [one.phase, one.bucket, one.round, round(one.begin_s - first_s, 7), round(one.end_s - first_s, 7)]
            for one in spans
        ],
        "ready_s": max(0.0, ready_s - first_s),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
