"""Damaged records of runs: what a run left, with a few things in it replaced, cut, renamed, lost or scribbled
over."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distcomp import recording
from distcomp.errors import DistcompError
from distcomp.report import as_json, as_text, compare, page
from distcomp.report.table import as_cards
from tests.report import synthetic

ODD = (
    None, True, 0, -5, 1, 2.5, 10**9, 10**40, 10**4000, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf,
    "", "x", "5", "nan", "<b>&\"'", "\x1b[31m", "\ud800", "a" * 5000, [], [1, 2], [[]], ["x"], {}, {"a": 1},
    {"a": {"b": []}}, {"kind": "step", "step": 3}, {"": None},
)  # fmt: skip
BYTES = (b"", b"\n", b"\0", b"{", b"]", b'"', b",", b"\xff\xfe", b"NaN", b"-Infinity", b"1e999", b"\\ud800")

Files = dict[str, bytes]


def good() -> dict[str, list[Any]]:
    """The lines of a run's files: two ranks, four steps, two evaluations."""
    about = {"format": recording.FORMAT, **synthetic.about("qsgd:bits=4", ranks=2, seed=1)}
    about["network"] = {
        **synthetic.NETWORK,
        "links": [{"asked_bps": 1e8, "achieved_bps": 9.57e7, "after_idle_bps": 9.51e7}],
    }
    lines: dict[str, list[Any]] = {"run.json": [about]}
    for rank in range(2):
        told: list[Any] = [{"kind": "note", "seed": 1, "steps": 4, "method": "qsgd:bits=4"}]
        for step in range(4):
            spent = {"encode_s": 0.01, "recode_s": 0.0, "wait_s": 0.1, "decode_s": 0.01}
            told.append(
                {
                    "kind": "step", "step": step, "step_s": 0.2, "exchange_s": 0.12, "phases": spent,
                    "exposed": spent, "payload_bytes": 1000, "payload_by_kind": {"codes": 1000},
                    "predicted_wire_bytes": 1100, "qdisc_bytes": 5000 + 1100 * step,
                }
            )  # fmt: skip
            if rank == 0 and step % 2:
                told.append({"kind": "metric", "step": step, "train_s": 0.2 * step, "test_loss": 1 / step})
        lines[f"rank{rank}.jsonl"] = told
    return lines


def _places(node: Any, into: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    for key in node if isinstance(node, dict) else range(len(node)):
        into.append((node, key))
        if isinstance(node[key], dict | list):
            _places(node[key], into)
    return into


def _scribbled(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(BYTES) + data[at + rng.randrange(8) :]


def damaged(rng: random.Random) -> Files:
    """The files of a run with one to three damages, in what they say or in how it is written."""
    lines = good()
    for _ in range(rng.randint(1, 3)):
        node, key = rng.choice(_places(lines[rng.choice(list(lines))], []))
        kind = rng.randrange(5)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(["other", "step", "kind", "test_loss", "train_s", "format"])] = node.pop(key)
        elif kind == 2:
            other, another = rng.choice(_places(lines[rng.choice(list(lines))], []))
            node[key] = copy.deepcopy(other[another])
        else:
            node[key] = copy.deepcopy(rng.choice(ODD))
        if not all(lines.values()):
            break
    files = {name: b"".join(json.dumps(one).encode() + b"\n" for one in told) for name, told in lines.items()}
    if rng.random() < 0.3:
        name = rng.choice(list(files))
        files[name] = _scribbled(files[name], rng)
    if rng.random() < 0.05:
        files[rng.choice(["rank2.jsonl", "rank-1.jsonl", "rank٣.jsonl", "rankx.jsonl"])] = (
            b'{"kind": "note"}\n'
        )
    if rng.random() < 0.05:
        del files[rng.choice(list(files))]
    return files


def write(files: Files, directory: Path) -> Path:
    """Put them where the last ones were."""
    directory.mkdir(exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def try_to_report(files: Files, directory: Path, sound: recording.Run) -> str:
    """What became of it beside a run that is sound: reported, or refused. A report is JSON, every coordinate
    in it is finite, and what it says of the sound run is what was so without the other."""
    write(files, directory)
    try:
        run = recording.read_run(directory)
        comparison = compare([sound, run])
    except DistcompError:
        return "refused"
    told = json.loads(json.dumps(as_json(comparison), allow_nan=False))
    assert told["rows"][0]["method"] == sound.method
    if run.method != sound.method:
        alone = json.loads(json.dumps(as_json(compare([sound], comparison.target_loss)), allow_nan=False))
        assert told["rows"][0] == alone["rows"][0]
        assert told["runs"][0] == alone["runs"][0]
    assert as_text(comparison)
    assert as_cards(comparison)
    html = page(comparison)
    html.encode("utf-8", errors="replace")
    for drawing in re.findall(r"<svg viewBox.*?</svg>", html, flags=re.DOTALL):
        for attribute in re.findall(r' (?:d|x|y|x1|y1|x2|y2|cx|cy|points)="([^"]*)"', drawing):
            assert not re.search(r"nan|inf", attribute), attribute
    return "reported"


def sound_run(directory: Path) -> recording.Run:
    """Plain DDP's, where nothing was damaged."""
    lines = good()
    lines["run.json"][0]["method"] = "ddp"
    for name in ("rank0.jsonl", "rank1.jsonl"):
        lines[name][0]["method"] = "ddp"
    files = {name: b"".join(json.dumps(one).encode() + b"\n" for one in told) for name, told in lines.items()}
    return recording.read_run(write(files, directory))


def cases(count: int, seed: int, directory: Path) -> Iterator[tuple[Files, Path, recording.Run]]:
    """Damaged records, each written to the same place."""
    rng = random.Random(seed)
    sound = sound_run(directory / "sound")
    for _ in range(count):
        yield damaged(rng), directory / "damaged", sound
