"""Prediction beside measurement: the step times that ``distcomp advise --json`` promised, and what came."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from distcomp.errors import DistcompError
from distcomp.report import words
from distcomp.report.figures import Comparison

Predicted = Mapping[str, float]
"""Method -> seconds of a step."""


@dataclass(frozen=True)
class Pair:
    """One method's step: predicted, and the mean of what its runs measured."""

    method: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted_s / self.measured_s - 1


def read_advice(path: Path) -> Predicted:
    """What ``distcomp advise --json`` wrote. Raises DistcompError for anything else."""
    try:
        advice = json.loads(path.read_text(encoding="utf-8"))
        return {row["method"]: float(row["prediction"]["step_s"]) for row in advice["methods"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DistcompError(
            f"{path} is no advice ({error!r}); write it to a new file: "
            "distcomp advise --json ... > advice.json"
        ) from None


def pairs_of(comparison: Comparison, predicted: Predicted) -> list[Pair]:
    """The methods of which both are known, in the order of the comparison.

    Raises DistcompError where there is none: the advice is of other methods, or no step was recorded.
    """
    pairs = []
    for row in comparison.rows:
        measured = row.spread("step_s")
        if row.method in predicted and measured is not None:
            pairs.append(Pair(row.method, predicted[row.method], measured.mean))
    if not pairs:
        raise DistcompError(
            f"the advice is of {', '.join(predicted)}, and none of these was measured; "
            "give distcomp advise the same --methods as the runs"
        )
    return pairs


def as_lines(pairs: list[Pair]) -> list[str]:
    """A table in plain characters."""
    width = 2 + max(len("method"), *(len(pair.method) for pair in pairs))
    lines = [f"{'method':<{width}}{'predicted':>12}{'measured':>12}{'error':>9}"]
    for pair in pairs:
        texts = (words.formatted(seconds, words.seconds) for seconds in (pair.predicted_s, pair.measured_s))
        lines.append(
            f"{pair.method:<{width}}" + "".join(f"{text:>12}" for text in texts) + f"{pair.error:>+9.1%}"
        )
    return lines


def section(pairs: list[Pair]) -> str:
    """The same for the page."""
    rows = "".join(
        f'<tr><th scope="row">{escape(pair.method)}</th>'
        f"<td>{escape(words.formatted(pair.predicted_s, words.seconds))}</td>"
        f"<td>{escape(words.formatted(pair.measured_s, words.seconds))}</td><td>{pair.error:+.1%}</td></tr>"
        for pair in pairs
    )
    head = "".join(f'<th scope="col">{text}</th>' for text in ("method", "predicted", "measured", "error"))
    return (
        "<section><h2>What was predicted of a step, and what it took</h2>"
        f'<table class="methods"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></section>'
    )
