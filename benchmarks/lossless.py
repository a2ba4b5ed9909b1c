"""What a lossless stage saves, what it costs, and when the advice is not to use it.

    python -m benchmarks.lossless            # writes results/lossless.json, row by row; a second call goes on

*Bytes*: gradients of ``examples/bytes_lm.py`` after some steps of training, as each compressor codes them,
through ``ans`` and ``zstd``: bytes that stay of a payload, and megabytes per second on one thread. Random
bytes are the control: nothing can be saved. *Steps*: training it on emulated links, with the stage and
without; the weights must be the same to the bit. *Advice*: what is predicted for the same links.
"""

from __future__ import annotations

import functools
import hashlib
import json
import runpy
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import arguments_of, gathered, median, on_network, start, write
from benchmarks._places import EXAMPLES, RESULTS
from distcomp.advice.advise import advise
from distcomp.attaching.observe import observe_alone
from distcomp.compressors import parse_compressor
from distcomp.kernels import entropy
from distcomp.layout import Layout
from distcomp.methods import Lossless, method_of
from distcomp.methods.lossless import row_periods
from distcomp.network import Fabric
from distcomp.network.model import Host
from distcomp.payload import Part, Payload
from distcomp.randomness import Key

NAME = "lossless"
EXAMPLE = runpy.run_path(str(EXAMPLES / "bytes_lm.py"), run_name="example")
COMPRESSORS = (
    "quantize:bits=2", "quantize:bits=3", "quantize:bits=4", "quantize:bits=8",
    "fp8", "mxfp8", "mxfp4", "nvfp4",
)  # fmt: skip
PLAIN = ("qsgd:bits=4", "qsgd:bits=2")
METHODS = tuple(
    text
    for plain in PLAIN
    for text in (plain, f"lossless:inner=({plain})", f"lossless:inner=({plain}),entropy=zstd")
)
ADVISED = tuple(method for method in METHODS if "zstd" not in method)
RATES = ("10mbit", "1gbit")
SEED, BATCH, AT_STEPS, REPEATS = 0, 8, (10, 30, 60), 7


@functools.cache
def trained(steps: int) -> tuple[torch.nn.Module, Any]:
    """The model after some steps, with the gradient of its next batch in it, and that batch."""
    source, draw = torch.cat(EXAMPLE["modules"]()), torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    model = EXAMPLE["Reader"]()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95))
    for step in range(steps + 1):
        text, following = EXAMPLE["texts"](source, BATCH, draw)
        optimizer.zero_grad()
        EXAMPLE["loss_of"](model(text), following).backward()
        if step < steps:
            optimizer.step()
    return model, (text, following)


def matrices(model: torch.nn.Module) -> tuple[Tensor, Layout]:
    """The gradients that methods compress, flat."""
    named = [(name, one) for name, one in model.named_parameters() if one.dim() > 1]
    layout = Layout.of([(name, tuple(one.shape)) for name, one in named])
    return torch.cat([one.grad.reshape(-1) for _, one in named]), layout


def coded(payload: Payload, coder: str, layout: Layout) -> dict[str, float]:
    """How many of the bytes stay, and how fast the codes, its last and longest part, are coded."""
    method = Lossless(method_of("identity"), coder)
    periods = functools.partial(row_periods, layout, 1)
    whole = method._coded(payload, periods)
    assert torch.equal(method._decoded(whole, payload.parts).body, payload.body)
    body = payload[payload.parts[-1].kind].clone()
    rows = periods(body.numel())
    stream = entropy.encode(body, coder, rows)
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(REPEATS):
        begin_s = time.perf_counter()
        entropy.encode(body, coder, rows)
        middle_s = time.perf_counter()
        entropy.decode(stream, body.numel(), coder)
        times["encode"].append(middle_s - begin_s)
        times["decode"].append(time.perf_counter() - middle_s)
    # The best of several: what else runs on the machine can only add.
    speeds = {f"{what}_mb_per_s": body.numel() / min(times_s) / 1e6 for what, times_s in times.items()}
    return {"ratio": whole.body.numel() / payload.body.numel(), **speeds}


def bytes_row(compressor: str) -> dict[str, Any]:
    """Of one compressor: the mean over gradients at several moments of training."""
    c, key, rows = parse_compressor(compressor), Key.of(SEED), []
    for steps in AT_STEPS:
        x, layout = matrices(trained(steps)[0])
        payload = c.encode(x, layout, key)
        rows.append({coder: coded(payload, coder, layout) for coder in entropy.CODERS})
        plain_bits = 8 * payload.body.numel() / layout.numel
    row: dict[str, Any] = {"compressor": compressor, "bits_per_value": plain_bits}
    for coder in entropy.CODERS:
        row[coder] = {key: sum(one[coder][key] for one in rows) / len(rows) for key in rows[0][coder]}
        row[coder]["ratios"] = [one[coder]["ratio"] for one in rows]
    return row


def control_row() -> dict[str, Any]:
    """Random bytes: nothing can be saved."""
    payload = Payload.empty((Part("codes", torch.uint8, 1 << 20),))
    nothing = Layout(())
    payload["codes"].random_(0, 256, generator=torch.Generator().manual_seed(SEED))
    return {
        "compressor": "random bytes",
        **{coder: coded(payload, coder, nothing) for coder in entropy.CODERS},
    }


def on_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank; the median step, the bytes, the loss and a digest of the weights."""
    rank, workers, steps = dist.get_rank(), dist.get_world_size(), settings["steps"]
    mine = torch.cat(EXAMPLE["modules"]()[rank::workers])
    draw = torch.Generator().manual_seed(100 + rank)
    torch.manual_seed(SEED)
    model = DistributedDataParallel(EXAMPLE["Reader"]())
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95))
    times_s, losses = [], []
    with distcomp.attach(model, optimizer, settings["method"], seed=SEED) as handle:
        for _ in range(steps):
            text, following = EXAMPLE["texts"](mine, BATCH, draw)
            begin_s = time.perf_counter()
            optimizer.zero_grad()
            loss = EXAMPLE["loss_of"](model(text), following)
            loss.backward()
            optimizer.step()
            times_s.append(time.perf_counter() - begin_s)
            losses.append(float(loss))
        sent_bytes = handle.stats()["payload_bytes"] / steps
    weights = torch.cat([one.detach().reshape(-1) for one in model.parameters()])
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    everyone = gathered({"step_s": median(times_s[3:]), "sent_bytes": sent_bytes, "digest": digest})
    assert len({one["digest"] for one in everyone}) == 1
    return {"step_s": everyone[0]["step_s"], "sent_bytes": sent_bytes, "loss": losses[-1], "digest": digest}


def step_row(method: str, rate: str, ranks: int, steps: int) -> dict[str, Any]:
    """One method on one link."""
    answer = on_network(NAME, ranks, rate, {"method": method, "steps": steps})
    return {"method": method, "rate": rate, "ranks": ranks, "steps": steps, **answer}


def advice_row(rate: str, ranks: int) -> dict[str, Any]:
    """What is predicted and recommended."""
    model, batch = trained(3)
    observed = [
        observe_alone(model, batch, EXAMPLE["loss_of"], lambda given: torch.optim.AdamW(given, 2e-3))
        for _ in "12"
    ]
    told = advise((observed[0], observed[1]), Fabric.uniform(ranks, rate), ADVISED, Host(ranks, 2)).as_json()
    rows = [{key: row[key] for key in ("method", "speed_up")} for row in told["methods"]]
    return {"rate": rate, "recommended": told["recommended"], "sentence": told["sentence"], "rows": rows}


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", choices=("bytes", "steps", "advice"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / f"{NAME}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = {part: before.get(part, []) for part in ("bytes", "steps", "advice")}
    result: dict[str, Any] = {"what": __doc__.splitlines()[0], **kept}

    def add(part: str, row: dict[str, Any]) -> None:
        result[part].append(row)
        write(NAME, {key: value for key, value in result.items() if value}, SEED)
        print(json.dumps(row), flush=True)

    done = {row["compressor"] for row in result["bytes"]}
    if given.only in (None, "bytes"):
        for compressor in COMPRESSORS:
            if compressor not in done:
                add("bytes", bytes_row(compressor))
        if "random bytes" not in done:
            add("bytes", control_row())
    taken = {(row["method"], row["rate"]) for row in result["steps"]}
    for rate in RATES if given.only in (None, "steps") else ():
        for method in ("ddp", *METHODS):
            if (method, rate) not in taken:
                add("steps", step_row(method, rate, given.ranks, given.steps))
    for rate in RATES if given.only in (None, "advice") else ():
        if rate not in {row["rate"] for row in result["advice"]}:
            add("advice", advice_row(rate, given.ranks))


if __name__ == "__main__":
    start(main, on_rank)
