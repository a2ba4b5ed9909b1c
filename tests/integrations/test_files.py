"""One file per rank in a directory: on as many ranks, on fewer, and what is refused; and what the README
shows."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import distcomp
from distcomp.integrations import files
from tests.attaching.ddp import jobs
from tests.integrations import agree

ROOM = Path(files.__file__).parent


def residual(handle):
    """By parameter, what this rank's state holds."""
    (part,) = handle.state_dict().values()
    return {name: leaves for name, leaves in part["state"].items() if leaves}


def first(rank, size, directory):
    model, optimizer, handle = jobs.attached(agree.ONE_BIT, rank)
    with handle:
        jobs.train(model, optimizer, rank, 3)
        files.save(handle, directory)
        gathered = handle.gather_state_dicts()
        return residual(handle), sorted(gathered)


def later(rank, size, directory):
    _, _, handle = jobs.attached(agree.ONE_BIT, rank)
    with handle:
        files.load(handle, directory)
        return residual(handle)


def refused(rank, size, directory):
    _, _, handle = jobs.attached(agree.ONE_BIT, rank)
    with handle, pytest.raises(distcomp.DistcompError) as error:
        files.load(handle, directory)
    return str(error.value)


def test_as_many_ranks_have_their_own_and_fewer_the_mean(cluster, tmp_path: Path):
    (zero, at_first), (one, elsewhere) = cluster(2).run(first, tmp_path)
    assert (at_first, elsewhere) == (["rank0", "rank1"], [])
    assert any(leaf.any() for leaves in zero.values() for leaf in leaves.values())
    for before, after in zip([zero, one], cluster(2).run(later, tmp_path), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    mean = {n: {p: (zero[n][p] + one[n][p]) / 2 for p in leaves} for n, leaves in zero.items()}
    (alone,) = cluster(1).run(later, tmp_path)
    torch.testing.assert_close(alone, mean)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["distcomp-rank0.pt", "distcomp-rank1.pt"]


def test_what_is_missing_is_named(cluster, tmp_path: Path):
    (said,) = cluster(1).run(refused, tmp_path)
    assert "holds nothing of distcomp's" in said
    cluster(2).run(first, tmp_path)
    (tmp_path / "distcomp-rank0.pt").unlink()
    (said,) = cluster(1).run(refused, tmp_path)
    assert "the parts of ranks [0] are missing" in said


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_library_that_is_not_there_is_named_with_its_extra(name, monkeypatch):
    for module in (name, f"{name}.pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"distcomp.integrations.{name}", raising=False)
    with pytest.raises(distcomp.DistcompError, match=rf"pip install 'distcomp\[{name}\]'"):
        importlib.import_module(f"distcomp.integrations.{name}")


SINKS = {"aim", "mlflow", "trackio", "wandb"}
"""They take records, and are no trainers."""


def test_the_readme_shows_names_that_exist_for_each_trainer():
    shown = re.findall(
        r"^\+from distcomp\.integrations\.(\w+) import (.+)$", (ROOM / "README.md").read_text(), re.M
    )
    trainers = {path.stem for path in ROOM.glob("*.py")} - {"__init__", "alone", "files", "series"} - SINKS
    assert {module for module, _ in shown} == trainers
    for module, names in shown:
        tree = ast.parse((ROOM / f"{module}.py").read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert set(names.split(", ")) <= there


def test_an_integration_is_small():
    lengths = {path.stem: len(path.read_text().splitlines()) for path in ROOM.glob("*.py")}
    del lengths["files"], lengths["alone"], lengths["series"]  # what they share
    assert max(lengths.values()) <= 60, lengths
