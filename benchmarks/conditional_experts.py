"""Experts on ranks of their own: step time against all-reducing gradients, and what codecs of rows cost.

    python -m benchmarks.conditional_experts --links    # step times on emulated links, and predicted
    python -m benchmarks.conditional_experts --study    # test loss by codec of rows, five seeds

``--links``: eight experts of 128 x 256, two of them for each token, on two ranks; the break-even is at 1,024
tokens of a rank and step. What is predicted with all experts on each rank starts from zeros that are sent on
the same ranks (``distcomp.advice.calibrate``); with experts spread over the ranks, from the same steps on a
link without limits and on one that only delays, and from nothing else but the link's rate
(``distcomp.advice.waiting``). Each rank keeps to a core of its own. Links take turns; how fast the machine is
at the moment is told by a step without exchanges, by which what was observed on one link is scaled to the
other. Medians over the rounds, of ratios, too.

``--study``: eight clusters, each with a linear classifier of its own.
Controls: a dense network with the same products for each token, and one with as many parameters; the mixture
without balancing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distcomp
from benchmarks._common import Cells, arguments_of, gathered, median, on_fabric, start
from benchmarks._conditional_tasks import clustered
from distcomp import calls
from distcomp.advice.calibrate import calibrate
from distcomp.advice.predict import predict, profile_method
from distcomp.advice.waiting import waiting_step_s
from distcomp.attaching.observe import timed
from distcomp.attaching.observe_waits import Wait, WaitingStep, observe_waits
from distcomp.conditional import MixtureOfExperts, balance_loss, keep_experts_local
from distcomp.network import Fabric, parse_rate
from distcomp.network.request_sizes import RequestSizes
from distcomp.network.shape import burst_bytes

WIDTH, HIDDEN, EXPERTS, K = 128, 256, 8, 2
TOKENS = (256, 4096)
DELAY_S = 5e-3
LINKS = {
    "unshaped": Fabric.uniform(2),
    "delayed": Fabric.uniform(2, delay=f"{DELAY_S}s"),
    "1gbit": Fabric.uniform(2, "1gbit"),
    "100mbit": Fabric.uniform(2, "100mbit"),
}
RATES = ("1gbit", "100mbit")
CODECS = ("identity", "qsgd:bits=8")
KINDS = tuple((codec, spread) for codec in CODECS for spread in (False, True))
STEPS, WARM_UP, ROUNDS = {256: 31, 4096: 11}, 3, 5
CORES = sorted(os.sched_getaffinity(0))
SIZES = (1 << 10, 16 << 10, 128 << 10, 512 << 10, 1 << 20, 2 << 20)
ROWS = ("identity", "bf16", "qsgd:bits=8", "qsgd:bits=4", "mxfp8")
SEEDS, TRAIN_STEPS, BATCH, LR = 5, 300, 128, 5e-3
STUDY_HIDDEN = 32
PLAN = {
    "width": WIDTH, "hidden": HIDDEN, "experts": EXPERTS, "k": K, "tokens": list(TOKENS),
    "steps": list(STEPS.values()), "rounds": ROUNDS, "seeds": SEEDS,
    "train_steps": TRAIN_STEPS, "batch": BATCH, "lr": LR, "study_hidden": STUDY_HIDDEN, "ranks": 2,
}  # fmt: skip


# ---------------------------------------------------------------------- the links


@contextmanager
def stepping(spread: bool, codec: str, tokens: int) -> Iterator[Callable[[], None]]:
    """A step of one mixture, whose tokens need gradients as in the middle of a network; its model and
    optimizer are attached until the end."""
    options: dict[str, Any] = {"parallel": dist.group.WORLD, "wire": codec} if spread else {}
    model, step = made(tokens, options)
    with distcomp.attach(model, method="identity" if spread else codec):
        yield step


def made(tokens: int, options: dict[str, Any]) -> tuple[DistributedDataParallel, Callable[[], None]]:
    """One mixture among ranks, and its step."""
    moe, _ = mixture(tokens, options)
    keep_experts_local(moe)
    model = DistributedDataParallel(moe)
    return model, stepped(model, moe, tokens)


def mixture(tokens: int, options: dict[str, Any]) -> tuple[MixtureOfExperts, Callable[[], None]]:
    """One mixture, and its step without gradients of others."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(WIDTH, HIDDEN, EXPERTS, K, **options)
    with torch.no_grad():
        moe.gate.clean.normal_(generator=torch.Generator().manual_seed(1))
    return moe, stepped(moe, moe, tokens)


def stepped(model: nn.Module, moe: MixtureOfExperts, tokens: int) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank())).requires_grad_()

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        (model(x).square().mean() + moe.balance_loss).backward()
        optimizer.step()

    return step


def keep_to_one_core() -> None:
    """All threads of this rank on a core of its own, as far as there are cores: after a wait the system wakes
    two ranks on one core as it happens, and their step takes up to twice as long."""
    core = CORES[dist.get_rank() % len(CORES)]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def link_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """All kinds of steps on one link, in turn; what is predicted of them comes first."""
    keep_to_one_core()
    found: dict[str, dict[str, Any]] = {"step_s": {}, "alone_s": {}, "waits": {}, "predicted_s": {}}
    for tokens in TOKENS:
        if settings["link"] in RATES:
            for codec, seconds in foretold(tokens, settings["link"]).items():
                found["predicted_s"][f"data-parallel|{codec}|{tokens}"] = seconds
        for codec, spread in KINDS:  # memory and code of all of them are warm when the first is timed
            with stepping(spread, codec, tokens) as step:
                timed(step, WARM_UP)
        for codec, spread in KINDS:
            name = f"{'expert' if spread else 'data'}-parallel|{codec}|{tokens}"
            found["alone_s"][name], _ = timed(mixture(tokens, {})[1], STEPS[tokens])
            with stepping(spread, codec, tokens) as step:
                found["step_s"][name], _ = timed(step, STEPS[tokens])
                if spread and settings["link"] == "unshaped":
                    seen = observe_waits(step, STEPS[tokens])
                    found["waits"][name] = [written(wait) for wait in seen.waits]
    calls.disconnect()
    return found


def foretold(tokens: int, rate: str) -> dict[str, float]:
    """Seconds of a step with all experts on each rank, by codec of gradients."""
    model, step = made(tokens, {})
    fabric = Fabric.uniform(2, rate)
    machine = calibrate(model, step, fabric, SIZES, len(CORES))
    layouts = machine.observed.layouts
    return {codec: predict(profile_method(codec, layouts, 2), machine, fabric).step_s for codec in CODECS}


def written(wait: Wait) -> dict[str, Any]:
    """As JSON holds it."""
    ask = wait.ask
    about = {"kind": ask.kind, "sizes": ask.sizes, "messages": ask.messages}
    return {**about, "after_s": wait.after_s, "took_s": wait.took_s}


def read(cell: dict[str, Any]) -> Wait:
    """What :func:`written` wrote."""
    messages = tuple(tuple(one) for one in cell["messages"])
    ask = RequestSizes(cell["kind"], tuple(cell["sizes"]), messages=messages)
    return Wait(ask, cell["after_s"], cell["took_s"])


def chained_s(cells: dict[str, dict[str, Any]], name: str, rate: str) -> float:
    """Seconds of a step with experts spread over ranks, from the same step on links without a limit."""

    def scaled_s(link: str, waited_s: float = 0.0) -> float:
        """Of a step there, had the machine been as fast as it was when this link was measured."""
        speed = cells[rate]["alone_s"][name] / cells[link]["alone_s"][name]
        return waited_s + speed * float(cells[link]["step_s"][name] - waited_s)

    waits = tuple(map(read, cells["unshaped"]["waits"][name]))
    step = WaitingStep(scaled_s("unshaped"), waits)
    step = step.delayed(scaled_s("delayed", len(waits) * DELAY_S), DELAY_S)
    bps = parse_rate(rate)
    return waiting_step_s(step, LINKS[rate], burst_s=8 * burst_bytes(bps) / bps)


def compared(rounds: list[dict[str, dict[str, Any]]], name: str, rate: str) -> dict[str, float]:
    """Medians over the rounds: of what was measured, of what was predicted, and of the ratio of the two in
    each round, as the machine changes from one to the next."""
    measured_s = [one[rate]["step_s"][name] for one in rounds]
    predicted_s = [
        one[rate]["predicted_s"][name] if name.startswith("data") else chained_s(one, name, rate)
        for one in rounds
    ]
    ratios = [predicted / measured for predicted, measured in zip(predicted_s, measured_s, strict=True)]
    return {
        "step_s": median(measured_s),
        "predicted_s": median(predicted_s),
        "predicted_over_measured": median(ratios),
    }


def links(cells: Cells) -> None:
    """Every round on every link, one after the other."""
    rounds = [
        {
            link: cells.get(
                f"round {turn}|{link}",
                lambda link=link: on_fabric("conditional_experts", LINKS[link], {"link": link}),
            )
            for link in LINKS
        }
        for turn in range(ROUNDS)
    ]
    for rate in RATES:
        found = {name: compared(rounds, name, rate) for name in rounds[0][rate]["step_s"]}
        cells.document["cells"][f"links|{rate}"] = found
        for name, row in found.items():
            both = f"{row['predicted_s']:9.4f}{row['step_s']:9.4f} s"
            print(f"{rate} {name:<34}{both}{row['predicted_over_measured'] - 1:+8.1%}")
    cells.write()


# ---------------------------------------------------------------------- the study


class Expertly(nn.Module):
    """A mixture beside the input, then a linear classifier."""

    def __init__(self, width: int, classes: int, mixture: nn.Module) -> None:
        super().__init__()
        self.mixture = mixture
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(x + self.mixture(x))
        return scores


def dense(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def built(name: str, width: int, seed: int) -> nn.Module:
    """The layer in the middle."""
    if name == "dense, as many products":
        return dense(width, K * STUDY_HIDDEN)
    if name == "dense, as many parameters":
        return dense(width, EXPERTS * STUDY_HIDDEN)
    weight = 0.0 if name == "no balancing" else 0.1
    wire = "identity" if name == "no balancing" else name
    return MixtureOfExperts(
        width, STUDY_HIDDEN, EXPERTS, K, parallel=dist.group.WORLD, wire=wire, seed=seed,
        importance_weight=weight, load_weight=weight,
    )  # fmt: skip


def study_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """All kinds of layers with one seed."""
    return {"rows": {name: studied(name, settings["seed"]) for name in settings["names"]}}


def studied(name: str, seed: int) -> dict[str, Any]:
    """One kind of layer, one seed, two ranks with batches of their own."""
    task = clustered()
    torch.manual_seed(seed)
    inner = Expertly(task.inputs, task.classes, built(name, task.inputs, seed))
    keep_experts_local(inner)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.Adam(inner.parameters(), LR)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAIN_STEPS)
    draw = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    mixed = isinstance(inner.mixture, MixtureOfExperts)
    before = sum(calls.sent_bytes().values()) if mixed else 0
    with distcomp.attach(model, optimizer, "identity"):
        for _ in range(TRAIN_STEPS):
            x, y = task(BATCH, draw)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            (loss + balance_loss(inner) if mixed else loss).backward()
            optimizer.step()
            rates.step()
    sent = (sum(calls.sent_bytes().values()) - before) / TRAIN_STEPS if mixed else 0.0
    inner.eval()
    with torch.no_grad():
        scores = inner(task.test[0])
    found: dict[str, Any] = {
        "test_loss": cross_entropy(scores, task.test[1]).item(),
        "test_accuracy": (scores.argmax(1) == task.test[1]).float().mean().item(),
        "row_bytes": sent,
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
    }
    if mixed:
        counts = torch.tensor(inner.mixture.routing.by_expert, dtype=torch.float32)
        found["largest_share"] = (counts.max() / counts.sum()).item()
        found["load_variation"] = (counts.var() / counts.mean().square()).item()
    gathered(0)
    calls.disconnect()
    return found


def rank_main(settings: dict[str, Any]) -> dict[str, Any]:
    return study_rank(settings) if "names" in settings else link_rank(settings)


def known(codec: str) -> bool:
    """Whether there is such a codec here."""
    try:
        distcomp.parse(codec)
    except distcomp.DistcompError:
        return False
    return True


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--links", action="store_true")
    parser.add_argument("--study", action="store_true")
    wanted = parser.parse_args()
    cells = Cells("conditional_experts", PLAN)
    if wanted.links:
        links(cells)
    if wanted.study:
        names = [row for row in ROWS if known(row)]
        names += ["no balancing", "dense, as many products", "dense, as many parameters"]
        for seed in range(SEEDS):
            settings = {"names": names, "seed": seed}
            cells.get(
                f"study|{seed}",
                lambda settings=settings: on_fabric("conditional_experts", Fabric.uniform(2), settings),
            )


if __name__ == "__main__":
    start(main, rank_main)
