"""What a newcomer has at hand: a script of the pages, a model, a run, and methods of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.project.pages import ROOT, python_block
from tests.report import synthetic

DISTCOMP = [sys.executable, "-m", "distcomp"]
LONG = "two_level:nodes=((0, 1), (2, 3)),across=(qsgd:bits=2,block=64)"
ARCHIVE = {"a.rather.long.name.of.a.parameter.of.a.deep.module.weight": (40, 40), "bias": (40,)}

TASK = """\
import torch
from distcomp.advice import TrainingTask

def training_task(arguments):
    def batch(worker, workers, step):
        return torch.ones(4, 64), torch.ones(4, 64)
    model = torch.nn.Linear(64, 64)
    return TrainingTask(model, batch, torch.nn.functional.mse_loss, lambda p: torch.optim.SGD(p, 0.1))
"""
OWN = {"own_method.py": "def averaging_toy(", "own_compressor.py": '@register_compressor("three_bytes")'}
"""The worked examples of CONTRIBUTING, by what is in them."""

TABLES = {
    "report": (["report", "runs"], ["ddp", "qsgd:bits=4", LONG]),
    "advise": (
        ["advise", "--ranks", "4", "--rate", "1gbit", "--methods", "bf16;qsgd:bits=4", "--model", "task.py"],
        ["ddp", "bf16", "qsgd:bits=4"],
    ),
    "compress": (["compress", "model.pt", "-o", "model.dcz"], list(ARCHIVE)),
    "methods": (["methods"], ["qsgd", "gradiveq", "torch:fp16", "Quantize"]),
    "one method": (["methods", "two_level"], ["two_level"]),
    "doctor": (["doctor"], ["torch", "kernels"]),
}
"""What prints a table: the command, and what must stand in it whole."""


def training_script(names_method: bool = False) -> str:
    """The script of docs/start.md, with more steps and with the one line that launchers/README.md asks for.
    Its method is left out, as the page says, where the shell is to choose it."""
    script = python_block("docs/start.md", "# this one")
    changes = [
        ("range(3)", "range(30)"),
        ('dist.init_process_group("gloo")', "distcomp.init_process_group()"),
    ]
    for old, new in changes if names_method else [(", distcomp.qsgd(bits=4))", ")"), *changes]:
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


def furnish(where: Path) -> Path:
    """A directory with all of it, and with the repository's examples and launchers."""
    where.mkdir(exist_ok=True)
    for name in ("examples", "launchers"):
        (where / name).symlink_to(ROOT / name)
    (where / "train.py").write_text(training_script())
    (where / "task.py").write_text(TASK)
    state = {name: torch.linspace(-1, 1, 40).repeat(40)[: torch.Size(shape).numel()].reshape(shape)
             for name, shape in ARCHIVE.items()}  # fmt: skip
    torch.save(state, where / "model.pt")
    for name, text in OWN.items():
        (where / name).write_text(python_block("CONTRIBUTING.md", text))
    runs = synthetic.experiment(where / "runs", methods=["ddp", "qsgd:bits=4", "bf16"])
    about = json.loads((runs[-1] / "run.json").read_text())
    (runs[-1] / "run.json").write_text(json.dumps(about | {"method": LONG}))
    return where
