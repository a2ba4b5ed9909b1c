"""A method in one file is found by everything; and the conformance tests find what is broken."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from distcomp import precision, pruning
from distcomp.cli import main
from distcomp.compressors import parse_compressor
from distcomp.methods import METHODS, from_compressor, parse
from distcomp.parametrize import bits, chain, install, parameters, remove
from distcomp.randomness import Key
from distcomp.registry import COMPRESSORS
from tests.buffers import ODD, ORDINARY, draw
from tests.conformance.subjects import methods
from tests.conformance.test_law import check_one_conversation

HERE = Path(__file__).parent
TOYS = HERE / "toys"


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[str]:
    """The name of a method that one file brings, for as long as a test lasts."""
    load("averaging_toy", Path(shutil.copy(TOYS / "averaging_toy.py", tmp_path)))
    yield "averaging_toy"
    del METHODS["averaging_toy"], sys.modules["averaging_toy"]


def test_one_file_adds_a_method_to_the_config_the_conformance_tests_the_shell_and_the_docs(
    toy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse(f"{toy}:grid=0.5") == METHODS[toy].recipe(grid=0.5)
    assert {str(subject) for subject in methods() if subject.name == toy} >= {toy, f"{toy}:grid=0.25"}

    assert main(["methods", "--json"]) == 0
    (told,) = (one for one in json.loads(capsys.readouterr().out)["methods"] if one["name"] == toy)
    assert told["summary"] == "Average what is rounded to multiples of ``grid``."
    assert told["settings"] == {"grid": 0.125}
    assert (told["wire"], told["paper"], told["biased"]) == ("2 (n-1)/n 4d", "none: a toy", True)

    assert main(["methods"]) == 0
    assert toy in capsys.readouterr().out

    monkeypatch.syspath_prepend(str(HERE.parents[1] / "docs"))
    pages = load("catalogue", HERE.parents[1] / "docs" / "catalogue.py").pages()
    assert "Average what is rounded to" in pages["methods.md"]
    assert "`grid=0.125`" in pages["methods/averaging_toy.md"]


@pytest.mark.parametrize("toy", ["averaging_toy", "two_round_toy", "compressor_toy", "parametrization_toy"])
def test_a_worked_example_that_contributors_read_is_the_file_that_is_tested(toy: str) -> None:
    contributing = (HERE.parents[1] / "CONTRIBUTING.md").read_text()
    assert f"```python\n{(TOYS / toy).with_suffix('.py').read_text()}```" in contributing


def test_a_method_of_two_rounds_in_one_file_keeps_the_law() -> None:
    load("two_round_toy", TOYS / "two_round_toy.py")
    try:
        method = parse("two_round_toy")
        for size in (1, 2, 3):
            assert len(check_one_conversation(method, size).asked) == 2 * size
            for layout in ODD.values():
                check_one_conversation(method, size, layout)
    finally:
        del METHODS["two_round_toy"], sys.modules["two_round_toy"]


def test_one_file_adds_a_compressor_to_the_texts_of_every_method() -> None:
    load("compressor_toy", TOYS / "compressor_toy.py")
    try:
        compressor = parse_compressor("three_bytes")
        assert str(compressor) == "three_bytes"
        (x,) = draw(1)
        payload = compressor.encode(x, ORDINARY, Key.of(0))
        assert payload.body.numel() == 3 * ORDINARY.numel
        missed = compressor.decode(payload, ORDINARY) - x
        assert 0 < float(missed.norm() / x.norm()) ** 2 <= 1 - compressor.delta(ORDINARY.numel)
        for method in (from_compressor(compressor), parse("ef21:compressor=three_bytes")):
            for layout in (ORDINARY, *ODD.values()):
                check_one_conversation(method, 3, layout)
    finally:
        del COMPRESSORS["three_bytes"], sys.modules["compressor_toy"]


def test_one_file_adds_a_parametrization_that_trains_stacks_and_comes_off() -> None:
    toeplitz = load("parametrization_toy", TOYS / "parametrization_toy.py").Toeplitz
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 5))
    dense = model[0].weight.detach().clone()
    install(model, "0.weight", toeplitz(24, 12))
    diagonals = [dense.diagonal(12 - 1 - number).mean() for number in range(24 + 12 - 1)]
    torch.testing.assert_close(parameters(model, "0.weight")[0], torch.stack(diagonals))
    assert bits(model, "0.weight") == 32 * (24 + 12 - 1)

    link = pruning.Mask(dense)
    link.mask.copy_(torch.arange(24 * 12).view(24, 12) % 3 != 0)
    install(model, "0.weight", link)
    precision.gradual(model, None, "Q2.4", skip=("2",))
    assert [type(link) for link in chain(model, "0.weight")][::2] == [toeplitz, pruning.Mask]
    x = torch.randn(64, 12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), x[:, :5].argmax(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    masked = model.eval()[0].weight.detach().clone()
    for owner in ("pruning", "precision"):
        remove(model, "0.weight", owner, materialize=False)
    theta = parameters(model, "0.weight")[0].detach()
    weight = model[0].weight.detach().clone()
    assert torch.equal(weight[1:, 1:], weight[:-1, :-1])
    assert torch.equal(masked, torch.round(weight * 16) / 16 * link.mask)
    copied = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 5))
    install(copied, "0.weight", toeplitz(24, 12))
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied[0].weight, theta[toeplitz(24, 12).diagonal])

    remove(model, "0.weight", "structured", densify=True)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, weight)


def test_the_conformance_tests_pass_a_sound_toy_and_find_every_mutant(tmp_path: Path) -> None:
    """Run on methods and compressors that each break a law (``toys/mutants.py``) and one that breaks none."""
    report, wanted = tmp_path / "report.xml", tmp_path / "wanted.json"
    files = [str(file) for file in sorted(HERE.glob("test_*.py")) if file.name != Path(__file__).name]
    plugins = ["-p", "tests.conformance.toys.mutants", "-p", "no:cacheprovider"]
    options = ["-q", "--tb=line", *plugins, f"--junitxml={report}"]
    path = os.pathsep.join([str(HERE.parents[1]), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env={**os.environ, "PYTHONPATH": path, "MUTANTS": str(wanted)},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert report.exists(), printed
    cases = list(ElementTree.parse(report).iter("testcase"))
    ran = [case.attrib["name"] for case in cases]
    failed = [case.attrib["name"] for case in cases if case.find("failure") is not None]
    assert all(case.find("error") is None for case in cases), printed

    assert sum("averaging_toy" in name for name in ran) > 30
    assert not [name for name in failed if "averaging_toy" in name], printed
    broken = json.loads(wanted.read_text())
    found = {who for who, test in broken.items() if any(n.startswith(test) and who in n for n in failed)}
    assert found == set(broken)
    assert len(found) > 30
