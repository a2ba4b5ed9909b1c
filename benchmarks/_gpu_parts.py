"""The parts of :mod:`benchmarks.gpu` that train: what ranks are asked, and what their answers must be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks._gpu_place import PATIENCE, Place, RankFailed, on_ranks
from benchmarks._gpu_training import BARE

METHODS = ("identity", "qsgd:bits=4", "powersgd:rank=4", "topk:ratio=0.01")
SHARDED = (
    (BARE, None),
    ("identity", None),
    ("qsgd:bits=4", None),
    ("powersgd:rank=4", None),
    ("topk:ratio=0.01", None),
    ("qsgd:bits=4", "qsgd:bits=8"),
)

TOLERANCE = 1e-2
"""How far a loss may lie from the CPU's, of it. Both round alike, but sums of products in another order move
a few values to the next level, or out of the largest, and training carries that on."""

Rows = Mapping[str, Mapping[str, Any]]


def size_of(place: Place, limit_s: float = 60.0) -> dict[str, float]:
    """The model and the steps, 17 MB of gradients or next to nothing; and when ranks have to have ended."""
    if place.rehearsal:
        return {"width": 64, "steps": 8, "limit_s": PATIENCE * limit_s}
    return {"width": 1440, "steps": 20, "limit_s": limit_s}


def on_devices(job: str, place: Place, settings: Mapping[str, Any], limit_s: float = 60.0) -> list[Rows]:
    """One rank for each GPU over NCCL; in a rehearsal two on the CPU over Gloo."""
    backend = "gloo" if place.rehearsal else "nccl"
    return on_ranks(job, place.ranks, place.device, backend, {**size_of(place, limit_s), **settings})


def against_the_cpu(job: str, place: Place, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A job on the devices and, with as many ranks, on the CPU over Gloo: losses, weights and bytes."""
    here = on_devices(job, place, settings)
    there = on_ranks(job, place.ranks, "cpu", "gloo", {**size_of(place), **settings})
    rows = {name: judged([one[name] for one in here], [one[name] for one in there]) for name in here[0]}
    return {
        "ok": all(row["ok"] for row in rows.values()),
        "ranks": place.ranks,
        "backend": "gloo" if place.rehearsal else "nccl",
        "tolerance": TOLERANCE,
        "replicas": "one rank: nothing to compare" if place.ranks == 1 else "compared bit for bit",
        "rows": rows,
    }


def judged(here: list[Mapping[str, Any]], there: list[Mapping[str, Any]]) -> dict[str, Any]:
    """One method's answers of all ranks, beside the CPU's."""
    far = max(farthest(mine["losses"], theirs["losses"]) for mine, theirs in zip(here, there, strict=True))
    replicas_equal = len({one["digest"] for one in here}) == 1
    bytes_equal = [one.get("payload_bytes") for one in here] == [one.get("payload_bytes") for one in there]
    learned = here[0]["losses"][-1] < here[0]["losses"][0]
    return {
        "ok": far <= TOLERANCE and replicas_equal and bytes_equal and learned,
        "losses": here[0]["losses"],
        "farthest from the CPU's": far,
        "replicas equal": replicas_equal,
        "payload bytes": here[0].get("payload_bytes"),
        "payload bytes equal the CPU's": bytes_equal,
        "step_s": here[0]["step_s"],
    }


def farthest(losses: Iterable[float], others: Iterable[float]) -> float:
    """The largest distance of two losses of a step, of the second; a NaN is infinitely far."""
    shares = [abs(one - other) / abs(other) for one, other in zip(losses, others, strict=True)]
    return max(share if share == share else float("inf") for share in shares)


def ddp_part(place: Place) -> dict[str, Any]:
    """DDP over NCCL; on a single GPU also two ranks that share it."""
    found = against_the_cpu("ddp", place, {"methods": [BARE, *METHODS]})
    if place.rehearsal or place.ranks == 1:
        found["two ranks on one device"] = {
            name: two_on_one(place, backend) for name, backend in shared_backends(place).items()
        }
    return found


def shared_backends(place: Place) -> dict[str, str]:
    """What two ranks on one device may meet over. Neither is promised, so neither fails the part."""
    if place.rehearsal:
        return {"Gloo, on the CPU": "gloo"}
    return {"Gloo, tensors on the GPU": "gloo", "NCCL": "nccl"}


def two_on_one(place: Place, backend: str) -> dict[str, str]:
    """What became of each method: what was refused is told in its own words."""
    settings = {**size_of(place, 30.0), "methods": [BARE, *METHODS]}
    try:
        both = on_ranks("ddp_until_refused", 2, place.device, backend, settings)
    except RankFailed as error:
        return {"all": str(error)}
    return {name: told([one[name] for one in both if name in one]) for name in both[0]}


def told(rows: list[Mapping[str, Any]]) -> str:
    """In a sentence, of both ranks."""
    refused = [row["refused"] for row in rows if "refused" in row]
    if refused:
        return refused[0]
    return "trained, replicas equal" if len({row["digest"] for row in rows}) == 1 else "replicas differ"


def fsdp2_part(place: Place) -> dict[str, Any]:
    """Sharded models over NCCL, weights gathered as they are and in few bits."""
    return against_the_cpu("fsdp2", place, {"methods": SHARDED})


def graphs_part(place: Place) -> dict[str, Any]:
    """Steps whose forward and backward are replayed equal those that are not, the exchange outside of the
    graph; and whether a backward can be captured with its exchange."""
    ranks = on_devices("graphs", place, {"methods": [BARE, *METHODS]})
    rows = {method: alike(ranks, f"{method}, eager", f"{method}, graphed") for method in (BARE, *METHODS)}
    found = {"ok": all(row["ok"] for row in rows.values()), "ranks": place.ranks, "rows": rows}
    if place.rehearsal:
        skipped = "a CPU has no CUDA graphs: both runs were eager, and no backward was captured"
        return {**found, "skipped": skipped}
    found["captured with the exchange"] = {one: captured(place, one) for one in METHODS[:2]}
    return found


def alike(ranks: list[Rows], one: str, other: str) -> dict[str, Any]:
    """Two runs of a method, on every rank: the same losses and weights to the last bit, or how far apart."""
    far = max(farthest(rank[other]["losses"], rank[one]["losses"]) for rank in ranks)
    equal = all(rank[one]["losses"] == rank[other]["losses"] for rank in ranks) and all(
        rank[one]["digest"] == rank[other]["digest"] for rank in ranks
    )
    replicas = {rank[other]["digest"] for rank in ranks}
    return {
        "ok": far <= TOLERANCE and len(replicas) == 1,
        "bits equal": equal,
        "farthest loss": far,
        "step_s": {name: ranks[0][name]["step_s"] for name in (one, other)},
    }


def captured(place: Place, method: str) -> str:
    """What became of a capture, each in processes of their own: one that failed leaves CUDA unusable."""
    try:
        ranks = on_devices("capture", place, {"method": method}, limit_s=25.0)
    except RankFailed as error:
        return f"refused: {error}"
    same = all(rank[method]["equal"] for rank in ranks)
    return f"captured; replayed, its gradients {'equal' if same else 'differ from'} those before"


def streams_part(place: Place) -> dict[str, Any]:
    """Beside other work a run gives the bits it gives alone. How often a step waits for the device is told,
    and nothing is asked of it."""
    averaging = "streaming_diloco:period=4,fragments=2"
    gradients = {**dict.fromkeys((BARE, *METHODS), True), averaging: False}
    settings = {"methods": list(gradients), "gradients": gradients}
    ranks = on_devices("streams", place, settings)
    rows = {method: under_load(ranks, method) for method in gradients}
    waits = on_devices("waits", place, {"methods": [BARE, *METHODS]})
    return {
        "ok": all(row["ok"] for row in rows.values()),
        "ranks": place.ranks,
        "rows": rows,
        "the host waits": waits[0],
    }


def under_load(ranks: list[Rows], method: str) -> dict[str, Any]:
    """A method's two runs; there must have been a load, and not a bit of difference."""
    alone, loaded = f"{method}, alone", f"{method}, under load"
    row = alike(ranks, alone, loaded)
    beside = min(rank[loaded]["products beside"] for rank in ranks)
    replicas = {rank[loaded]["digest"] for rank in ranks}
    return {
        **row, "ok": row["bits equal"] and len(replicas) == 1 and beside > 0, "products beside": beside,
    }  # fmt: skip
