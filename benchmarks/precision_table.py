"""What do low-precision numbers cost in test loss? Digit pairs, two small networks.

    python -m benchmarks.precision_table            # resumes; writes results/precision_table.json
    python -m benchmarks.precision_table --json     # and prints it

An MLP (128-96-96-96-10), a CNN (1 x 8 x 16 images, 12 and 24 filters) and, for the claim about depth, an MLP
of eight layers of 64, all with batch norms, so that signs have a scale, and the deep one once more without
norms ("bare": a lower rate, twice the steps). SGD with momentum, one learning rate for all rows but those
that say so. Five seeds; differences are paired by seed, as every row begins at the same weights and sees the
same batches. Rows called "from float32" train half of their steps before they are converted. Rows called
"torchao" need ``pip install --no-deps torchao==0.18.*`` and wait for it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import Cells, arguments_of
from benchmarks._crowd import warm_up_then_cosine
from benchmarks._digit_networks import NETWORKS, without_relus
from benchmarks._places import example
from distcomp import precision

STEPS, BATCH, SEEDS, RATE = 400, 64, 5, 0.1
Net = nn.Module


@dataclass(frozen=True)
class Row:
    """One method: what it does to the network, bits of weights, activations and gradients, and its loop."""

    convert: Callable[[Net], Net]
    bits: tuple[float, float, float]
    rate: float = RATE
    penalty: float = 0.0
    optimizer: Callable[[Net, float], torch.optim.Optimizer] | None = None
    autocast: bool = False
    steps: int = STEPS
    fine: float = 0.1
    """The rate of fine-tuning, in units of ``rate``."""
    late: bool = False
    """Converted after half of the steps."""
    tuned: str = ""
    """How activations become 4 bits wide after half of the steps: all at once ("plain"), or from the bottom
    to the top, where all "above" learns, or the "next" layer."""


def sgd(net: Net, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), rate, momentum=0.9)


def fixed(format: str, rounding: str, gradients: str | None = None) -> Callable[[Net], Net]:
    return lambda net: precision.fixed_point(net, format, rounding=rounding, gradients=gradients, exact=False)


def dorefa(w: int, a: int, g: int, stochastic: bool = True, **how: Any) -> Row:
    return Row(lambda net: precision.dorefa(net, w, a, g, stochastic=stochastic), (w, a, g), **how)


def tuned(how: str) -> Row:
    return Row(lambda net: precision.gradual(net, "Q3.1"), (32, 4, 32), tuned=how)


def tuned_bare(how: str, masked: bool) -> Row:
    """For the network without norms: a lower rate, more steps, activations that leave the range."""
    return Row(
        lambda net: precision.gradual(net, "Q2.2", masked=masked), (32, 4, 32), rate=0.02, tuned=how,
        steps=2 * STEPS, fine=1.0,
    )  # fmt: skip


def slowly(slower: float) -> Callable[[Net, float], torch.optim.Optimizer]:
    """SGD whose latent weights learn more slowly, and what a layer shares at a hundredth of the rate."""
    return lambda net, rate: torch.optim.SGD(precision.slow_groups(net, rate, slower), momentum=0.9)


def adamw(net: Net, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), 0.1 * rate, weight_decay=0.0)


def adam8(net: Net, rate: float) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    torch.compiler.set_stance("force_eager")  # it compiles its step, which takes longer than these runs
    return AdamW8bit(net.parameters(), 0.1 * rate, weight_decay=0.0, block_size=64)


def float8(net: Net) -> Net:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(pad_inner_dim=True, emulate=True)
    return convert_to_float8_training(net, config=config)


ROWS: dict[str, Row] = {
    "fp32": Row(lambda net: net, (32, 32, 32)),
    "fp32, AdamW": Row(lambda net: net, (32, 32, 32), optimizer=adamw),
    "bf16 autocast": Row(lambda net: net, (32, 16, 16), autocast=True),
    "8-bit AdamW states (torchao)": Row(lambda net: net, (32, 32, 32), optimizer=adam8),
    "float8, emulated (torchao)": Row(float8, (8, 8, 8)),
    "fixed point Q4.12, stochastic": Row(fixed("Q4.12", "stochastic"), (16, 16, 16)),
    "fixed point Q4.12, nearest": Row(fixed("Q4.12", "nearest"), (16, 16, 16)),
    "fixed point Q4.8, stochastic": Row(fixed("Q4.8", "stochastic"), (12, 12, 12)),
    "fixed point Q4.8, nearest": Row(fixed("Q4.8", "nearest"), (12, 12, 12)),
    "dorefa 1-32-32": dorefa(1, 32, 32),
    "dorefa 2-32-32": dorefa(2, 32, 32),
    "dorefa 32-1-32": dorefa(32, 1, 32),
    "dorefa 32-2-32": dorefa(32, 2, 32),
    "dorefa 32-32-2": dorefa(32, 32, 2),
    "dorefa 32-32-4": dorefa(32, 32, 4),
    "dorefa 32-32-4, no noise": dorefa(32, 32, 4, stochastic=False),
    "dorefa 32-32-2, no noise": dorefa(32, 32, 2, stochastic=False),
    "dorefa 1-2-6": dorefa(1, 2, 6),
    "binary_connect": Row(lambda net: precision.binary_connect(net, skip=("first", "last")), (1, 32, 32)),
    "binary_connect, stochastic": Row(
        lambda net: precision.binary_connect(net, stochastic=True, glorot=True, skip=("first", "last")),
        (1, 32, 32),
    ),
    "bnn": Row(lambda net: precision.bnn(without_relus(net)), (1, 1, 32)),
    "xnor_net": Row(lambda net: precision.xnor_net(without_relus(net)), (1, 1, 32)),
    "xnor_net without K": Row(
        lambda net: precision.xnor_net(without_relus(net), input_scale=False), (1, 1, 32)
    ),
    "few_multiplications": Row(
        lambda net: precision.few_multiplications(net, skip=("first", "last")), (2, 32, 32)
    ),
    "ttq": Row(precision.ttq, (2, 32, 32), optimizer=slowly(1.0)),
    "ttq, one rate for all": Row(precision.ttq, (2, 32, 32)),
    "ttq, AdamW": Row(precision.ttq, (2, 32, 32), optimizer=adamw),
    "dorefa 1-32-32, AdamW": dorefa(1, 32, 32, optimizer=adamw),
    "binary_connect, AdamW": Row(
        lambda net: precision.binary_connect(net, skip=("first", "last")), (1, 32, 32), optimizer=adamw
    ),
    "ttq, from float32": Row(precision.ttq, (2, 32, 32), optimizer=slowly(1.0), late=True),
    "dorefa 1-32-32, from float32": dorefa(1, 32, 32, late=True),
    "binary_connect, from float32": Row(
        lambda net: precision.binary_connect(net, skip=("first", "last")), (1, 32, 32), late=True
    ),
    "weighted_entropy 3-32": Row(lambda net: precision.weighted_entropy(net, 3, every=10), (3, 32, 32)),
    "weighted_entropy 3-3": Row(lambda net: precision.weighted_entropy(net, 3, 3, every=10), (3, 3, 32)),
    "compact_binary": Row(
        precision.compact_binary, (1, 2, 32), penalty=1e-6, optimizer=slowly(0.1)
    ),
    "compact_binary, last in float32": Row(
        lambda net: precision.compact_binary(net, skip=("first", "last")), (1, 2, 32), penalty=1e-6,
        optimizer=slowly(0.1),
    ),
    "4-bit activations, fine-tuned": tuned("plain"),
    "4-bit activations, bottom to top, above": tuned("above"),
    "4-bit activations, bottom to top, next": tuned("next"),
}  # fmt: skip
DEEP = [name for name, row in ROWS.items() if row.tuned or name == "fp32"]

BARE: dict[str, Row] = {
    "fp32": Row(lambda net: net, (32, 32, 32), rate=0.02, steps=2 * STEPS),
    "4-bit activations, fine-tuned": tuned_bare("plain", masked=True),
    "4-bit activations, fine-tuned, no mask": tuned_bare("plain", masked=False),
    "4-bit activations, bottom to top, above, no mask": tuned_bare("above", masked=False),
}
"""The rows of the network without norms."""

CLAIMS = [
    ("16 bits follow float32", "fp32", "fixed point Q4.12, stochastic"),
    ("nearest rounding stalls (16 bits)", "fixed point Q4.12, stochastic", "fixed point Q4.12, nearest"),
    ("nearest rounding stalls (12 bits)", "fixed point Q4.8, stochastic", "fixed point Q4.8, nearest"),
    ("activations are more sensitive than weights (1 bit)", "dorefa 1-32-32", "dorefa 32-1-32"),
    ("activations are more sensitive than weights (2 bits)", "dorefa 2-32-32", "dorefa 32-2-32"),
    ("gradients are more sensitive than activations (2 bits)", "dorefa 32-2-32", "dorefa 32-32-2"),
    ("gradients need noise (2 bits)", "dorefa 32-32-2", "dorefa 32-32-2, no noise"),
    ("gradients need noise (4 bits)", "dorefa 32-32-4", "dorefa 32-32-4, no noise"),
    (
        "bottom to top beats plain fine-tuning (all above learn)",
        "4-bit activations, bottom to top, above", "4-bit activations, fine-tuned",
    ),
    (
        "bottom to top beats plain fine-tuning (the next learns)",
        "4-bit activations, bottom to top, next", "4-bit activations, fine-tuned",
    ),
    (
        "bottom to top beats plain fine-tuning (all above learn; gradients pass clamps)",
        "4-bit activations, bottom to top, above, no mask", "4-bit activations, fine-tuned, no mask",
    ),
    (
        "masking what is clamped helps plain fine-tuning",
        "4-bit activations, fine-tuned", "4-bit activations, fine-tuned, no mask",
    ),
    ("ternary beats binary (BinaryConnect)", "ttq", "binary_connect"),
    ("ternary beats binary (DoReFa)", "ttq", "dorefa 1-32-32"),
    ("ternary beats binary (BinaryConnect), AdamW", "ttq, AdamW", "binary_connect, AdamW"),
    ("ternary beats binary (DoReFa), AdamW", "ttq, AdamW", "dorefa 1-32-32, AdamW"),
    (
        "ternary beats binary (BinaryConnect), from float32",
        "ttq, from float32", "binary_connect, from float32",
    ),
    ("ternary beats binary (DoReFa), from float32", "ttq, from float32", "dorefa 1-32-32, from float32"),
    ("ternary beats binary (connections at random)", "few_multiplications", "binary_connect, stochastic"),
    ("XNOR-Net loses more than BNN", "bnn", "xnor_net"),
    ("XNOR-Net loses more than binary weights", "binary_connect", "xnor_net"),
    ("XNOR-Net's map K helps", "xnor_net", "xnor_net without K"),
]  # fmt: skip
"""What papers lead one to expect: in words, the row that should lose less, and the row that loses more."""


class Loop:
    """Digit pairs for one seed: the same batches for every row."""

    def __init__(self, row: Row, network: str, seed: int) -> None:
        digits = example("digits")

        (images, labels), held_out = digits.digits()
        self.pairs, self.train = digits.pairs, (images, labels)
        self.test = digits.pairs(*held_out, 4000, torch.Generator().manual_seed(0))
        self.draw = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.row = row
        self.net: Net = NETWORKS[network]()
        if not row.late:
            self.net = row.convert(self.net)

    def run(self, steps: int, rate: float) -> bool:
        """Train what learns; False where the loss is not finite any more."""
        optimizer = (self.row.optimizer or sgd)(self.net, rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_then_cosine(steps))
        self.net.train()
        for _ in range(steps):
            x, y = self.pairs(*self.train, BATCH, self.draw)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.row.autocast):
                loss = nn.functional.cross_entropy(self.net(x), y)
            if self.row.penalty:
                loss = loss + precision.bipolar_penalty(self.net, self.row.penalty)
            if not math.isfinite(loss.item()):
                return False
            loss.backward()
            optimizer.step()
            schedule.step()
        return True

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        x, y = self.test
        self.net.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.row.autocast):
            scores: Tensor = self.net(x).float()
        loss = nn.functional.cross_entropy(scores, y).item()
        return {"test_loss": loss, "test_accuracy": (scores.argmax(1) == y).float().mean().item()}


def stretches(loop: Loop) -> Iterator[tuple[int, float]]:
    """(steps, learning rate) of each part of a run."""
    row = loop.row
    if not (row.late or row.tuned):
        yield row.steps, row.rate
        return
    half = row.steps // 2
    if row.late:
        yield half, row.rate
        loop.net = row.convert(loop.net)
        yield half, row.rate
        return
    precision.set_activations(loop.net, False)
    yield half, row.rate
    if row.tuned == "plain":
        precision.set_activations(loop.net, True)
        yield half, row.fine * row.rate
        return
    phases = sum(1 for _ in precision.bottom_to_top(loop.net))
    for _ in precision.bottom_to_top(loop.net, row.tuned):
        yield half // phases, row.fine * row.rate


def cell(row: Row, network: str, seed: int) -> dict[str, Any]:
    loop = Loop(row, network, seed)
    for steps, rate in stretches(loop):
        if not loop.run(steps, rate):
            return {"diverged": True}
    return loop.evaluate()


def summarize(runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds, and the differences to float32 seed by seed."""
    through = [(one, base) for one, base in zip(runs, plain, strict=True) if "diverged" not in one]
    summary: dict[str, Any] = {"diverged": len(runs) - len(through)}
    if through:
        losses = [one["test_loss"] for one, _ in through]
        differences = [one["test_loss"] - base["test_loss"] for one, base in through]
        summary |= {
            "mean": statistics.mean(losses),
            "spread": statistics.stdev(losses) if len(losses) > 1 else None,
            "test_accuracy": statistics.mean(one["test_accuracy"] for one, _ in through),
            "paired_difference_mean": statistics.mean(differences),
            "paired_difference_spread": statistics.stdev(differences) if len(losses) > 1 else None,
        }
    return summary


def weigh(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every claim on every network: the difference of test losses seed by seed, worse minus better.

    A run that diverged counts as chance, ln 10.
    """

    def loss(network: str, name: str, seed: int) -> float:
        return float(done[key(network, name, seed)].get("test_loss", math.log(10)))

    found: dict[str, Any] = {}
    for claim, better, worse in CLAIMS:
        for network in NETWORKS:
            gaps = [
                loss(network, worse, seed) - loss(network, better, seed)
                for seed in range(SEEDS)
                if {key(network, better, seed), key(network, worse, seed)} <= set(done)
            ]
            if gaps:
                found.setdefault(claim, {})[network] = {
                    "gap": statistics.mean(gaps),
                    "spread": statistics.stdev(gaps) if len(gaps) > 1 else None,
                    "seeds_for": sum(gap > 0 for gap in gaps),
                    "seeds": len(gaps),
                }
    return found


def rows_of(network: str) -> dict[str, Row]:
    if network == "bare":
        return BARE
    return {name: ROWS[name] for name in DEEP} if network == "deep" else ROWS


def key(network: str, name: str, seed: int) -> str:
    return f"{network} | {name} | seed {seed}"


def tabulate(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every network's rows, over the seeds that they and float32 have run with."""
    table: dict[str, Any] = {}
    for network in NETWORKS:
        for name, row in rows_of(network).items():
            seeds = [s for s in range(SEEDS) if {key(network, one, s) for one in (name, "fp32")} <= set(done)]
            if seeds:
                runs, plain = ([done[key(network, one, s)] for s in seeds] for one in (name, "fp32"))
                table.setdefault(network, {})[name] = {
                    "bits": row.bits,
                    "seeds": len(seeds),
                    **summarize(runs, plain),
                }
    return table


def tables(document: dict[str, Any]) -> None:
    document |= {"table": tabulate(document["cells"]), "claims": weigh(document["cells"])}


def plan() -> list[tuple[int, str, str]]:
    """(seed, network, row) of every cell, those that the claims name first."""
    claimed = {"fp32", *(name for _, *pair in CLAIMS for name in pair)}
    every = [
        (seed, network, name) for seed in range(SEEDS) for network in NETWORKS for name in rows_of(network)
    ]
    return sorted(every, key=lambda cell: cell[2] not in claimed)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--json", action="store_true", help="print the whole result")
    parser.add_argument("--rows", nargs="*", default=[*ROWS, *BARE], help="these alone; none: only tables")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="these alone")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    about = {
        "task": "digit pairs, last digit of the sum", "steps": STEPS, "batch": BATCH, "seeds": SEEDS,
        "rate": RATE, "optimizer": "SGD, momentum 0.9, warm-up then cosine",
        "reduced": "networks of 32,554, 21,194 and 39,050 parameters and 400 steps, so that all fits half an "
        "hour of one core; fixed point accumulates in float32; the deep network trains the rows of its claim",
    }  # fmt: skip
    cells = Cells("precision_table", about)
    for seed, network, name in plan():
        if name not in wanted.rows or network not in wanted.networks:
            continue
        if name.endswith("(torchao)") and importlib.util.find_spec("torchao") is None:
            print(f"{name}: torchao is not installed", file=sys.stderr)
            continue
        row = rows_of(network)[name]
        cells.get(key(network, name, seed), lambda r=row, n=network, s=seed: cell(r, n, s))
        tables(cells.document)
    tables(cells.document)
    cells.write()
    table = cells.document["table"]
    if wanted.json:
        print(json.dumps(cells.document))
        return
    for network, rows in table.items():
        for name, row in rows.items():
            shown = f"{row['mean']:8.3f} +- {row['spread'] or 0:.3f}" if "mean" in row else "  diverged"
            print(f"{network}  {name:<36}{shown}")


if __name__ == "__main__":
    main()
