"""Run directories that look like those of a training, made from numbers that a test can know."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from distcomp import recording
from distcomp.recording import Recorder

NETWORK = {
    "asked": "4 ranks at 100mbit",
    "fabric": 'ranks = 4\nrate = "100mbit"\n',
    "real": True,
    "achieved": "asked 100mbit, achieved 95.7 Mbit/s, one message after idle 95.1 Mbit/s",
    "packets": "real packets, network namespaces (root), tc tbf both ways, burst 12500 bytes",
}
EXPERIMENT = {
    # method: payload bytes, compute, encode, recode, wait, decode in seconds, final loss, final accuracy
    "ddp": (6_291_456, 0.021, 0.0, 0.0, 0.534, 0.0, 0.312, 0.893),
    "torch:fp16": (3_145_728, 0.023, 0.0, 0.0, 0.268, 0.0, 0.312, 0.892),
    "bf16": (3_145_728, 0.021, 0.001, 0.0, 0.263, 0.001, 0.315, 0.891),
    "qsgd:bits=8": (1_585_152, 0.021, 0.003, 0.002, 0.131, 0.002, 0.309, 0.894),
    "qsgd:bits=4": (798_720, 0.022, 0.003, 0.002, 0.066, 0.002, 0.318, 0.889),
    "qsgd:bits=1": (208_896, 0.021, 0.002, 0.002, 0.018, 0.002, 0.325, 0.885),
    "none": (0, 0.021, 0.0, 0.0, 0.0, 0.0, 1.41, 0.62),
}


def about(method: str, **more: Any) -> dict[str, Any]:
    """A run.json."""
    return {
        "method": method,
        "ranks": 4,
        "argv": ["examples/digits.py", "--seed", "0"],
        "network": NETWORK,
        "started": "2026-05-04T10:00:00+00:00",
        "host": {"cpu": "Example 9000 CPU @ 2.50GHz", "cores": 2, "system": "Linux 6.1.0"},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "distcomp": "0.1.0"},
        "commit": "0123456789ab",
        "exit_status": 0,
        **more,
    }


def write(directory: Path, description: dict[str, Any], ranks: dict[int, list[dict[str, Any]]]) -> Path:
    """A run directory with exactly these records, each with its kind."""
    directory.mkdir(parents=True)
    recording.write_about(directory, description)
    for rank, records in ranks.items():
        recorder = Recorder(directory, rank)
        for record in records:
            fields = {key: value for key, value in record.items() if key != "kind"}
            getattr(recorder, record["kind"])(**fields)
        recorder.close()
    return directory


def training(directory: Path, method: str, seed: int = 0, steps: int = 250, ranks: int = 4) -> Path:
    """A run of ``method`` as the experiment above has it, with noise."""
    payload, compute, encode, recode, wait, decode, loss, accuracy = EXPERIMENT[method]
    noise = random.Random(f"{method} {seed}")
    files: dict[int, list[dict[str, Any]]] = {}
    for rank in range(ranks):
        records: list[dict[str, Any]] = [{"kind": "note", "seed": seed, "steps": steps}]
        train_s, counted = 0.0, 100_000
        for step in range(steps + 1):
            if step % 10 == 0 and rank == 0:
                left = math.exp(-4 * step / steps) * (1 + 0.03 * noise.gauss(0, 1))
                records.append(
                    {
                        "kind": "metric", "step": step, "train_s": train_s,
                        "test_loss": loss + (2.303 - loss) * left * (1 if step else 0.999),
                        "test_accuracy": accuracy - (accuracy - 0.1) * min(1.0, left) ** 1.3,
                    }
                )  # fmt: skip
            if step == steps:
                break
            waited = wait * noise.uniform(0.97, 1.06)
            exposed = {"encode_s": encode, "recode_s": recode, "wait_s": waited, "decode_s": decode}
            step_s = compute * noise.uniform(0.95, 1.1) + encode + recode + waited + decode
            train_s += step_s + 0.002
            counted += int(payload * 1.046)
            records.append(
                {
                    "kind": "step", "step": step, "step_s": step_s,
                    "exchange_s": waited + encode + recode + decode,
                    "phases": exposed, "exposed": exposed,
                    "payload_bytes": payload, "payload_by_kind": {"values": payload},
                    "predicted_wire_bytes": int(payload * 1.045), "qdisc_bytes": counted,
                }
            )  # fmt: skip
        files[rank] = records
    return write(directory, about(method), files)


def experiment(parent: Path, seeds: int = 1, methods: list[str] | None = None) -> list[Path]:
    """One run per method and seed."""
    return [
        training(parent / f"{seed}-{at}-{method.replace(':', '-')}", method, seed)
        for seed in range(seeds)
        for at, method in enumerate(methods or EXPERIMENT)
    ]
