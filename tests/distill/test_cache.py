"""Logits on disk: computed once, bit for bit what they were, whole after a crash, of one teacher alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distcomp import distill
from distcomp.errors import DistcompError
from tests.distill.networks import mlp, rows


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0

    def forward(self, x):
        self.rows += len(x)
        return self.inner(x)


def test_each_example_is_computed_once(tmp_path):
    network = Counting(mlp(seed=1))
    x, y = rows(12)
    teach = distill.Distill(mlp(8), distill.CachedTeacher(network, tmp_path), distill.hinton())
    first = [teach(x[i : i + 4], y[i : i + 4], range(i, i + 4)).item() for i in (0, 4, 8)]
    assert network.rows == 12
    assert [teach(x[i : i + 4], y[i : i + 4], range(i, i + 4)).item() for i in (0, 4, 8)] == first
    assert network.rows == 12


def test_what_is_read_again_is_what_was_written(tmp_path):
    x, _ = rows(10)
    network = mlp(seed=1)
    written = distill.CachedTeacher(network, tmp_path).predict(x, range(10)).logits
    digest = distill.digest_of(network)
    alone = distill.CachedTeacher(None, tmp_path, teacher=digest)
    assert torch.equal(alone.predict(x[[7, 2]], torch.tensor([7, 2])).logits, written[[7, 2]])
    with pytest.raises(DistcompError, match="example 11 has no cached logits"):
        alone.predict(x[:1], [11])


def test_a_torn_record_is_written_anew(tmp_path):
    x, _ = rows(3)
    network = mlp(seed=1)
    written = distill.CachedTeacher(network, tmp_path).predict(x, [5, 6, 7]).logits
    (file,) = tmp_path.glob("*.logits")
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    teacher = distill.CachedTeacher(network, tmp_path)
    assert len(teacher.cache) == 2
    assert torch.equal(teacher.predict(x, [5, 6, 7]).logits, written)
    assert file.read_bytes() == whole


def test_a_damaged_record_and_another_teacher_are_refused(tmp_path):
    network = mlp(seed=1)
    distill.CachedTeacher(network, tmp_path).predict(rows(3)[0], [5, 6, 7])
    with pytest.raises(DistcompError, match="another teacher"):
        distill.CachedTeacher(mlp(seed=2), tmp_path)
    (file,) = tmp_path.glob("*.logits")
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DistcompError, match="damaged at record 2"):
        distill.CachedTeacher(network, tmp_path)
    file.write_bytes(b"{}".ljust(300))
    with pytest.raises(DistcompError, match="does not hold cached logits"):
        distill.CachedTeacher(network, tmp_path)


def test_a_rank_without_a_file_begins_with_the_others_and_then_keeps_to_its_own(tmp_path):
    x, _ = rows(3)
    theirs = distill.LogitCache(tmp_path, "t", rank=1)
    theirs.put([0, 1], x[:2])
    mine = distill.LogitCache(tmp_path, "t", rank=0)
    assert torch.equal(mine.get([0, 1]), x[:2])
    mine.put([2], x[2:])
    theirs.put([3], x[:1])
    again = distill.LogitCache(tmp_path, "t", rank=0)
    assert torch.equal(again.get([0, 1, 2]), x)  # what it began with is in its own file by now
    assert len(again) == 3


def test_keys_and_features_are_asked_for_by_name(tmp_path):
    teacher = distill.CachedTeacher(mlp(seed=1), tmp_path)
    with pytest.raises(DistcompError, match="3 rows came with no keys"):
        teacher.predict(rows(3)[0])
    with pytest.raises(DistcompError, match="no features"):
        distill.Distill(mlp(8), teacher, distill.fitnet_hint("1", "1", nn.Identity()))
    with pytest.raises(DistcompError, match="digest"):
        distill.CachedTeacher(None, tmp_path)
    teacher.predict(rows(3)[0], [0, 1, 2])
    with pytest.raises(DistcompError, match="4 classes"):
        teacher.cache.put([9], torch.zeros(1, 3))


def test_known_logits_are_taken_by_their_places():
    x, _ = rows(6)
    logits = mlp(seed=1)(x)
    teach = distill.Distill(mlp(8), distill.KnownLogits(logits), distill.hinton(2, 1.0))
    places = torch.tensor([4, 0, 4])
    direct = distill.Distill(mlp(8), mlp(seed=1), distill.hinton(2, 1.0))
    assert torch.allclose(teach(x[places], keys=places), direct(x[places]), atol=1e-6)
    for keys in (None, [0, 1], [0, 1, 6], [-1, 0, 1]):
        with pytest.raises(DistcompError, match="one place below 6"):
            teach(x[:3], keys=keys)
