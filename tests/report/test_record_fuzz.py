"""Damaged records of runs are refused in a sentence or reported right. ``python -m benchmarks.fuzz_records``
tries 20,000."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from distcomp import recording
from distcomp.errors import DistcompError
from distcomp.report import as_json, compare, page
from tests.report import record_fuzz


def test_damaged_records_are_refused_or_reported_right(tmp_path: Path) -> None:
    became = [record_fuzz.try_to_report(*case) for case in record_fuzz.cases(300, 0, tmp_path)]
    assert 30 < became.count("reported") < 270


def test_a_sound_record_is_reported(tmp_path: Path) -> None:
    lines = record_fuzz.good()
    files = {name: b"".join(json.dumps(one).encode() + b"\n" for one in told) for name, told in lines.items()}
    sound = record_fuzz.sound_run(tmp_path / "sound")
    assert record_fuzz.try_to_report(files, tmp_path / "other", sound) == "reported"


@pytest.mark.parametrize(
    "links",
    [[None], "links", {"asked_bps": 1}, [{"asked_bps": "1"}], [{"asked_bps": 10**400}], [{"asked_bps": -1}]],
)
def test_links_that_no_launcher_wrote_are_refused(tmp_path: Path, links: Any) -> None:
    recording.write_about(tmp_path, {"method": "ddp", "network": {"links": links}})
    with pytest.raises(DistcompError, match="is not the record of a run"):
        recording.read_run(tmp_path)


def test_a_loss_that_is_not_finite_reaches_no_target_and_what_is_not_finite_is_text_in_json(
    tmp_path: Path,
) -> None:
    recording.write_about(tmp_path, {"method": "ddp", "seed": math.nan, "versions": {"torch": math.inf}})
    recorder = recording.Recorder(tmp_path, 0)
    recorder.metric(step=1, train_s=1.0, test_loss=-math.inf)
    recorder.close()
    found = compare([recording.read_run(tmp_path)], target_loss=1.0)
    assert found.rows[0].reached == 0
    assert 'cy="-inf"' not in page(found)
    told = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert told["runs"][0]["seed"] == "nan"
    assert told["runs"][0]["versions"] == {"torch": "inf"}
