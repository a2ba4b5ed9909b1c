"""What is recorded is read back, whatever happens to the process in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcomp import recording
from distcomp.errors import DistcompError
from distcomp.recording import Recorder


def record(directory: Path, rank: int = 0) -> Recorder:
    directory.mkdir(exist_ok=True)
    if not (directory / "run.json").exists():
        recording.write_about(directory, {"method": "ddp", "ranks": 2})
    return Recorder(directory, rank)


def test_what_is_recorded_is_read_back(tmp_path: Path) -> None:
    recorder = record(tmp_path)
    recorder.note(seed=3, steps=2)
    recorder.step(step=0, step_s=0.5, payload_bytes=10)
    recorder.metric(step=1, train_s=0.5, test_loss=float("nan"))
    recorder.step(step=1, step_s=0.25, payload_bytes=12)
    recorder.close()
    run = recording.read_run(tmp_path)
    assert (run.method, run.about["seed"], run.about["steps"]) == ("ddp", 3, 2)
    assert [one["payload_bytes"] for one in run.of_kind("step")] == [10, 12]
    assert [one["kind"] for one in run.ranks[0]] == ["step", "metric", "step"]
    assert run.of_kind("metric")[0]["test_loss"] != run.of_kind("metric")[0]["test_loss"]


def test_a_tensor_of_one_number_is_recorded_as_that_number(tmp_path: Path) -> None:
    class Scalar:
        def item(self) -> float:
            return 1.5

    record(tmp_path).metric(step=0, test_loss=Scalar())
    assert recording.read_run(tmp_path).of_kind("metric")[0]["test_loss"] == 1.5
    with pytest.raises(DistcompError, match="a set cannot be recorded"):
        record(tmp_path).metric(step=0, test_loss={1})


@given(cut=st.integers(min_value=0), steps=st.integers(0, 12))
def test_a_file_cut_anywhere_keeps_every_whole_line_and_can_be_continued(
    tmp_path_factory: pytest.TempPathFactory, cut: int, steps: int
) -> None:
    directory = tmp_path_factory.mktemp("run")
    recorder = record(directory)
    for step in range(steps):
        recorder.step(step=step, note="é" * step)
    recorder.close()
    path = directory / "rank0.jsonl"
    data = path.read_bytes()
    data = data[: cut % (len(data) + 1)]
    path.write_bytes(data)

    whole = data.count(b"\n")
    assert [one["step"] for one in recording.read_run(directory).of_kind("step")] == list(range(whole))
    again = record(directory)
    again.step(step=whole)
    again.close()
    assert [one["step"] for one in recording.read_run(directory).of_kind("step")] == list(range(whole + 1))


def test_a_torn_tail_longer_than_a_page_is_dropped(tmp_path: Path) -> None:
    record(tmp_path).step(step=0)
    with (tmp_path / "rank0.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "step": 1, "junk": "' + b"x" * 10_000)
    record(tmp_path).step(step=1)
    assert [one["step"] for one in recording.read_run(tmp_path).of_kind("step")] == [0, 1]


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "step", "st',
        "[]",
        '{"kind": "song", "step": 1}',
        '{"kind": "step"}',
        '{"kind": "metric", "step": "x"}',
        '{"kind": "step", "step": 1, "step_s": "fast"}',
        '{"kind": "step", "step": 1, "payload_bytes": -5}',
        '{"kind": "step", "step": 1, "payload_bytes": 1e308}',
        '{"kind": "step", "step": 1, "exposed": [1]}',
        '{"kind": "step", "step": 1, "exposed": {"wait_s": null, "encode_s": "x"}}',
        '{"kind": "note", "method": 3}',
        '{"kind": "note", "argv": "text"}',
        "[" * 100_000,
    ],
)
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    recorder = record(tmp_path)
    recorder.step(step=0)
    with (tmp_path / "rank0.jsonl").open("a") as file:
        file.write(line + "\n")
    recorder.step(step=1)
    with pytest.raises(DistcompError, match=r"line 2 of .*rank0\.jsonl is damaged"):
        recording.read_run(tmp_path)


@given(st.lists(st.tuples(st.sampled_from(["step", "metric"]), st.integers(0, 6)), max_size=25))
def test_what_a_resumed_run_repeats_replaces_what_it_did_before(events: list[tuple[str, int]]) -> None:
    """Steps of each kind come out strictly rising, and nothing later is lost to something earlier."""
    records = [{"kind": kind, "step": step, "serial": serial} for serial, (kind, step) in enumerate(events)]
    kept = recording._latest(records)
    for kind in ("step", "metric"):
        steps = [one["step"] for one in kept if one["kind"] == kind]
        assert steps == sorted(set(steps))
    serials = [one["serial"] for one in kept]
    assert serials == sorted(serials)
    if records:
        assert kept[-1]["serial"] == records[-1]["serial"]


def test_a_run_resumed_at_step_2_counts_its_steps_once(tmp_path: Path) -> None:
    recorder = record(tmp_path)
    for first, stop, mark in ((0, 5, "old"), (2, 4, "new")):
        for step in range(first, stop):
            recorder.step(step=step, mark=mark)
            recorder.metric(step=step + 1, test_loss=1.0)
            recorder.metric(step=step + 1, test_accuracy=0.5)
    run = recording.read_run(tmp_path)
    marks = [(one["step"], one["mark"]) for one in run.of_kind("step")]
    assert marks == [(0, "old"), (1, "old"), (2, "new"), (3, "new")]
    assert [one["step"] for one in run.of_kind("metric")] == [1, 2, 3, 4]
    assert all(one["test_loss"] == 1.0 and one["test_accuracy"] == 0.5 for one in run.of_kind("metric"))


def test_sigkill_loses_nothing(tmp_path: Path) -> None:
    script = (
        "import os, signal; from distcomp.recording import Recorder\n"
        "r = Recorder.from_env(0)\n"
        "for i in range(5): r.step(step=i)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {recording.RUN_DIR: str(tmp_path / "new" / "run"), recording.METHOD: "bf16"}
    done = subprocess.run([sys.executable, "-c", script], env=environment)
    assert done.returncode == -signal.SIGKILL
    run = recording.read_run(tmp_path / "new" / "run")
    assert len(run.of_kind("step")) == 5
    assert (run.asked, run.method) == ("bf16", "bf16 (never attached)")
    assert run.about["versions"]["python"] == sys.version.split()[0]
    assert run.about["host"]["cpu"]


def test_no_directory_no_recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(recording.RUN_DIR, raising=False)
    assert Recorder.from_env(0) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(recording.RUN_DIR, str(tmp_path / "file" / "run"))
    with pytest.warns(UserWarning, match="file/run cannot be written .* training goes on"):
        assert Recorder.from_env(1) is None


def test_a_full_disk_is_warned_of_once_and_stops_nothing(tmp_path: Path) -> None:
    recorder = record(tmp_path)
    recorder.step(step=0)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, recorder._file)
    os.close(full)
    with pytest.warns(UserWarning, match=r"rank0\.jsonl cannot be written .*training goes on") as told:
        recorder.step(step=1)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder.step(step=2)
        recorder.metric(step=2, test_loss=1.0)
    recorder.close()
    assert len(recording.read_run(tmp_path).of_kind("step")) == 1


def test_a_line_that_found_room_for_its_beginning_only_is_left_out(tmp_path: Path) -> None:
    """A file may grow to 60 bytes: the second line is torn, the third is not written behind it."""
    script = (
        "import resource, sys, warnings; from pathlib import Path; from distcomp.recording import Recorder\n"
        "warnings.simplefilter('error', ResourceWarning)\n"
        "r = Recorder(Path(sys.argv[1]), 0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60, resource.RLIM_INFINITY))\n"
        "for i in range(3): r.step(step=i, what='x')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "r.step(step=3)\n"
    )
    record(tmp_path, rank=1).close()
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be written") == 1
    assert [one["step"] for one in recording.read_run(tmp_path).of_kind("step")] == [0]


def test_the_method_is_what_was_attached_not_what_was_asked_for(tmp_path: Path) -> None:
    recording.write_about(tmp_path, {"asked": "bf16", "ranks": None})
    recorder = Recorder(tmp_path, 0)
    assert recording.read_run(tmp_path).method == "bf16 (never attached)"
    recorder.note(method="qsgd:bits=4")
    recorder.note(steps=3)
    run = recording.read_run(tmp_path)
    assert (run.method, run.asked, run.about["ranks"]) == ("qsgd:bits=4", "bf16", 1)
    recorder.note(method="ddp")
    assert recording.read_run(tmp_path).method == "qsgd:bits=4, then ddp"


def test_a_launcher_s_description_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recording.write_about(tmp_path, {"method": "ddp", "ranks": 4})
    monkeypatch.setenv(recording.RUN_DIR, str(tmp_path))
    assert Recorder.from_env(0) is not None
    assert json.loads((tmp_path / "run.json").read_text()) == {"format": 1, "method": "ddp", "ranks": 4}


def test_runs_are_found_one_level_down(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("b", "a"):
        record(tmp_path / "set" / name)
    found = recording.find_runs([tmp_path / "set", tmp_path / "set" / "b"])
    assert [one.name for one in found] == ["a", "b"]
    with pytest.raises(DistcompError, match="holds no run"):
        recording.find_runs([tmp_path])


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(DistcompError, match="format 99"):
        recording.read_run(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(DistcompError, match="not the record of a run"):
        recording.read_run(tmp_path)
