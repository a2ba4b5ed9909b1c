"""What a report says in its headline: nothing below the noise, nothing over a network that failed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from distcomp import recording
from distcomp.report import Comparison, as_json, compare, page
from distcomp.report.claims import verdict
from distcomp.report.table import as_cards, columns
from tests.report import synthetic

LINK = {"asked_bps": 1e10, "achieved_bps": 1.5e9, "after_idle_bps": 3.4e9}


def run(
    where: Path, method: str, seconds: float, first_s: float | None = None, sent: int = 100, **about: Any
) -> recording.Run:
    """Eight steps of so many seconds, and an evaluation at the end."""
    records: list[dict[str, Any]] = [
        {"kind": "step", "step": at, "step_s": seconds, "payload_bytes": sent} for at in range(8)
    ]
    if first_s is not None:
        records[0]["step_s"] = first_s
    train_s = sum(one["step_s"] for one in records)
    records.append({"kind": "metric", "step": 8, "train_s": train_s, "test_loss": 1.0})
    name = f"{len(list(where.iterdir())):02}"
    return recording.read_run(synthetic.write(where / name, synthetic.about(method, **about), {0: records}))


def compared(where: Path, *runs: tuple[Any, ...], **about: Any) -> Comparison:
    return compare([run(where, *one, **about) for one in runs])


def test_one_run_of_each_claims_nothing(tmp_path: Path) -> None:
    told = verdict(compared(tmp_path, ("ddp", 1.85), ("identity", 1.0)))
    assert told.winner is None
    assert told.sentence.startswith("No method is called faster: DDP ran once")


def test_a_difference_within_what_two_runs_of_the_baseline_differ_by_is_none(tmp_path: Path) -> None:
    found = compared(tmp_path, ("ddp", 1.3), ("identity", 1.0), ("ddp", 1.0))
    told = verdict(found)
    assert told.winner is None
    assert told.sentence.startswith("No difference beyond chance: identity is 1.15 times as fast")
    assert "26.1 %" in told.sentence
    assert as_json(found)["verdict"] == told.sentence
    assert 'class="row best"' not in page(found)
    assert 'class="tile"' not in page(found)


def test_a_difference_beyond_it_is_said_with_the_loss_it_is_about(tmp_path: Path) -> None:
    found = compared(tmp_path, ("ddp", 2.02), ("bf16", 1.0, None, 50), ("ddp", 2.0))
    told = verdict(found)
    assert told.winner is not None
    assert told.winner.method == "bf16"
    goal = "a test loss of 1.0500 (DDP's last one and 5 %)"
    assert told.sentence == f"bf16 reaches {goal} 2.01 times sooner than DDP"
    assert 'class="row best"' in page(found)


def test_what_sends_as_much_is_said_to(tmp_path: Path) -> None:
    told = verdict(compared(tmp_path, ("ddp", 2.02), ("identity", 1.0), ("ddp", 2.0)))
    assert told.sentence.endswith("2.01 times sooner than DDP, with as many bytes")


def test_a_network_that_failed_its_self_test_carries_no_claim(tmp_path: Path) -> None:
    network = synthetic.NETWORK | {"links": [LINK], "achieved": "asked 10gbit, achieved 1500.0 Mbit/s"}
    runs = (("ddp", 2.02), ("bf16", 1.0), ("ddp", 2.0))
    told = verdict(compared(tmp_path, *runs, network=network))
    assert told.winner is None
    assert told.sentence.startswith("No method is called faster: the network did not hold its rate")
    assert "1500.0" in told.sentence
    unshaped = LINK | {"asked_bps": math.inf}
    (tmp_path / "unshaped").mkdir()
    again = compared(tmp_path / "unshaped", *runs, network=network | {"links": [unshaped]})
    assert verdict(again).winner is not None


def test_what_the_first_step_takes_longer_is_told_apart(tmp_path: Path) -> None:
    found = compared(tmp_path, ("ddp", 1.0, 9.0), ("bf16", 1.0), ("ddp", 1.0))
    ddp = found.rows[0]
    assert [one.curve[0].train_s for one in ddp.runs] == [8.0, 8.0]
    assert ddp.runs[0].starting_s == 8.0
    assert verdict(found).sentence.startswith("No difference beyond chance")


def test_what_a_script_logs_under_its_own_names_is_drawn_or_named(tmp_path: Path) -> None:
    metrics = [
        {"kind": "metric", "step": at, "loss": 1.0 / at, "text": "é<b>", "list": [1], "steep": 1e308}
        for at in range(1, 4)
    ]
    records = [{"kind": "step", "step": at, "step_s": 0.5} for at in range(3)]
    made = synthetic.write(tmp_path / "run", synthetic.about("ddp"), {0: [*records, *metrics]})
    found = compare([recording.read_run(made)])
    html = page(found)
    assert "loss against seconds of training" in html
    assert "Logged and not drawn: text, list." in html
    assert [point.others["loss"] for point in found.rows[0].runs[0].curve] == [1.0, 0.5, 1 / 3]
    assert [point.train_s for point in found.rows[0].runs[0].curve] == [1.5] * 3


LOGGED = [1e308, -1e308, math.inf, -math.inf, math.nan, -5, 10**400, [1], {"a": 1}, "text", None, True]


@pytest.mark.parametrize("name", ["train_s", "test_loss", "test_accuracy", "pruned", "loss"])
def test_whatever_a_script_logs_makes_a_page(tmp_path: Path, name: str) -> None:
    metrics = [
        {"kind": "metric", "step": at, "train_s": at, "test_loss": 1.0, "test_accuracy": 0.5, name: value}
        for at, value in enumerate(LOGGED)
    ]
    for start in range(len(metrics)):
        turned = [one | {"step": at} for at, one in enumerate(metrics[start:] + metrics[:start])]
        made = synthetic.write(tmp_path / str(start), synthetic.about("ddp"), {0: turned})
        found = compare([recording.read_run(made)])
        as_json(found)
        as_cards(found)
        assert "<h1>" in page(found)


def test_cards_hold_every_figure_of_the_table(tmp_path: Path) -> None:
    found = compared(tmp_path, ("ddp", 2.0), ("qsgd:bits=4", 1.0))
    cards = as_cards(found)
    for row in found.rows:
        for column in columns(found):
            assert column.cell(row) in cards
    assert max(map(len, cards.splitlines())) <= 60
