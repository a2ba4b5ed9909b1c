"""The study of claims put once more: what it trains can be made, and what its table and its estimate say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.claims_revisited import (
    ALONE,
    AT_THE_END,
    DDP,
    DILOCO,
    NEVER,
    STUDY,
    Run,
    carrier_of,
    found,
    gaps,
    noise_scale,
    text,
)
from benchmarks.docs_figures import claims


def test_each_run_can_be_made_and_has_a_name_of_its_own() -> None:
    runs = [run for claim in STUDY.values() for run in claim]
    assert len({run.key for run in runs}) == len(set(runs))
    for carrier in {run.carrier for run in runs}:
        carrier_of(carrier)
    assert {claim for claim in STUDY if not claim.startswith("batch")} == set(claims.QUESTIONS)


def test_a_run_goes_on_from_another_as_it_was() -> None:
    """Ended workers are begun from twice, and nothing of the first run is in the second."""
    run = Run(NEVER, "AdamW", 1e-3, 3, before=4, before_rate=0.03)
    first = found(run)
    assert found(run) == first
    assert first["own_loss"] != first["test_loss"]
    assert found(Run(NEVER, "AdamW", 1e-3, 3))["test_loss"] != first["test_loss"]


def test_gaps_are_between_the_better_of_two_rates() -> None:
    def cell(loss: float) -> dict[str, float]:
        return {"test_loss": loss, "own_loss": 2 * loss, "sent_bytes": 8.0}

    losses = {DDP: (2.0, 3.0), DILOCO: (4.0, 3.0), NEVER: (5.0, 6.0)}
    cells = {
        run.key: cell(loss)
        for carrier, pair in losses.items()
        for run, loss in zip(text(carrier, 1), pair, strict=True)
    }
    table = gaps(cells)
    assert {name: row["1"]["relative_loss"] for name, row in table.items()} == {
        DDP: 1.0, DILOCO: 1.5, AT_THE_END: 2.5, ALONE: 5.0,
    }  # fmt: skip
    assert table[DILOCO]["1"]["rate"] == text(DILOCO, 1)[1].rate
    assert all(set(row) == {"1"} for row in table.values())


@pytest.mark.parametrize("noise", [3.0, 10.0])
def test_the_noise_scale_of_gradients_whose_noise_is_known(noise: float) -> None:
    """A gradient of ones and Gaussian noise: the variance of an example over the gradient's square."""
    draw, batch = torch.Generator().manual_seed(0), 4
    many = [1 + noise / batch**0.5 * torch.randn(8, 2000, generator=draw) for _ in range(20)]
    assert noise_scale(many, batch) == pytest.approx(noise**2, rel=0.1)
