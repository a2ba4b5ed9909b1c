"""A student and its teacher on one process: who is trained, who is looked at, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distcomp import distill
from distcomp.errors import DistcompError
from tests.distill.networks import cnn, mlp, rows


def test_only_the_student_learns():
    student, teacher = mlp(8), mlp(16, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    teach = distill.Distill(student, teacher, distill.hinton(3, 0.7))
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    x, y = rows(32)
    first = teach(x, y)
    for _ in range(30):
        optimizer.zero_grad()
        teach(x, y).backward()
        optimizer.step()
    assert teach(x, y) < 0.8 * first
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module is teacher for module in student.modules())
    assert teach.iterations == 30
    assert set(teach.last) == {"labels", "teacher"}
    assert torch.equal(teach.logits, student(x))


def test_the_teacher_is_in_evaluation_whoever_trains_it():
    teacher = nn.Sequential(mlp(), nn.Dropout(0.5), nn.BatchNorm1d(4))
    teach = distill.Distill(mlp(8), teacher, distill.hinton(1, 1.0))
    teacher.train()
    x, _ = rows(8)
    assert torch.equal(teach(x), teach(x))
    assert int(teacher[2].num_batches_tracked) == 0


def test_several_teachers_are_their_mean():
    student, first, second = mlp(8), mlp(9, seed=1), mlp(10, seed=2)
    x, _ = rows(5)
    said = distill.SeveralTeachers([first, second], [3, 1]).predict(x)
    assert torch.allclose(said.logits, 0.75 * first(x) + 0.25 * second(x), atol=1e-6)
    teach = distill.Distill(student, [first, second], distill.hinton(2, 1.0))
    p = 0.5 * (first(x) / 2).softmax(1) + 0.5 * (second(x) / 2).softmax(1)
    kl = nn.functional.kl_div((student(x) / 2).log_softmax(1), p, reduction="batchmean")
    assert torch.allclose(teach(x), 4 * kl, atol=1e-6)


def test_schedules_count_iterations_and_are_saved():
    x, y = rows(8)
    student, teacher = mlp(8), mlp(seed=1)
    teach = distill.Distill(student, teacher, distill.hinton(2, "0 -> 1 @ 2"))
    for _ in range(2):
        assert teach(x, y).item() == pytest.approx(nn.functional.cross_entropy(student(x), y).item())
        teach(x, y).backward()
    again = distill.Distill(mlp(8), teacher, distill.hinton(2, "0 -> 1 @ 2"))
    again.load_state_dict(teach.state_dict())
    assert torch.equal(again(x, y), teach(x, y))
    assert set(again.last) == {"teacher"}
    with pytest.raises(DistcompError, match="iterations"):
        again.load_state_dict({"iterations": -1, "seed": 0})


def test_an_accumulated_backward_is_no_iteration():
    student = mlp(8)
    teach = distill.Distill(student, mlp(seed=1), distill.hinton())
    from distcomp.training import clock_of

    with clock_of(student).no_sync():
        teach(*rows(4)).backward()
    assert teach.iterations == 0
    teach(*rows(4)).backward()
    assert teach.iterations == 1


def test_a_hint_trains_what_is_below_it_and_leaves_a_plain_network():
    student, teacher = mlp(8), mlp(16, seed=1)
    names = set(student.state_dict())
    x, y = rows(32)
    regressor = distill.regressor(student, "1", teacher, "3", x)
    assert regressor.weight.shape == (16, 8)
    thaw = distill.freeze_above(student, "1", x)
    assert [p.requires_grad for p in student.parameters()] == [True, True, False, False, False, False]
    teach = distill.Distill(student, teacher, distill.fitnet_hint("1", "3", regressor))
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    first = teach(x).item()
    for _ in range(40):
        optimizer.zero_grad()
        teach(x).backward()
        optimizer.step()
    assert teach(x).item() < 0.5 * first
    assert teach.summary().heads == 8 * 16 + 16
    thaw()
    teach.remove()
    assert set(student.state_dict()) == names
    assert all(p.requires_grad for p in student.parameters())
    assert distill.Distill(student, teacher, distill.hinton())(x, y).requires_grad


def test_a_regressor_brings_a_larger_map_to_a_smaller_one():
    x = torch.randn(2, 1, 4, 4)
    teacher = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU())
    regressor = distill.regressor(cnn(3), "1", teacher, "1", x)
    assert regressor(torch.randn(2, 3, 4, 4)).shape == (2, 5, 2, 2)
    with pytest.raises(DistcompError, match="at least as large"):
        distill.regressor(teacher, "1", cnn(3), "1", x)


def test_attention_and_factors_look_inside():
    student, teacher = cnn(3), cnn(7, seed=1)
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 4
    paraphraser, translator = distill.Paraphraser(7, 3), distill.Translator(3, 3)
    loss = (
        distill.hard_labels()
        + distill.attention({"1": "1", "3": "3"}, beta=10)
        + distill.factor_transfer("2", "2", paraphraser, translator, beta=5)
    )
    teach = distill.Distill(student, teacher, loss)
    teach(x, y).backward()
    assert set(teach.last) == {"labels", "attention", "factor"}
    assert all(p.grad is not None for p in translator.parameters())
    assert all(p.grad is None for p in paraphraser.parameters())
    assert set(map(id, translator.parameters())) <= set(map(id, student.parameters()))


def test_a_copy_of_the_student_is_not_tapped():
    student = cnn(3)
    teach = distill.Distill(student, cnn(4, seed=1), distill.hard_labels() + distill.attention(["1"]))
    twin = copy.deepcopy(student)
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 4
    twin(x)
    with pytest.raises(DistcompError, match="'1' gave nothing"):
        teach._taps.taken()
    assert teach(x, y).requires_grad


def test_taps_survive_the_compiler():
    student, teacher = cnn(3), cnn(4, seed=1)
    loss = distill.hard_labels() + distill.attention(["1"], beta=7)
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 4
    eager = distill.Distill(copy.deepcopy(student), teacher, loss)(x, y)
    teach = distill.Distill(torch.compile(student, backend="eager"), teacher, loss)
    assert torch.allclose(teach(x, y), eager)
    assert torch.allclose(teach(x, y), eager)


def test_a_tap_that_came_too_late_for_the_compiler_is_named():
    torch._dynamo.reset()
    compiled = torch.compile(cnn(3), backend="eager")
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 4
    compiled(x)
    teach = distill.Distill(compiled, cnn(4, seed=1), distill.hard_labels() + distill.attention(["1"]))
    with pytest.raises(DistcompError, match="'1' gave nothing"):
        teach(x, y)


def test_the_summary_says_what_training_costs():
    student, teacher = mlp(8), mlp(16, seed=1)
    said = distill.Distill(student, teacher, distill.hinton()).summary(rows(4)[0])
    assert (said.student, said.heads) == (6 * 8 + 8 + 64 + 8 + 8 * 4 + 4, 0)
    assert said.student_flops == 2 * 4 * (48 + 64 + 32)
    assert said.teacher_flops == 2 * 4 * (96 + 256 + 64)
    assert "never sent" in str(said)
    assert said.wire_factor == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s, t: distill.Distill(s, s, distill.hinton()), "copy.deepcopy"),
        (lambda s, t: distill.Distill(s, t, nn.CrossEntropyLoss()), "CrossEntropyLoss"),
        (lambda s, t: distill.Distill(s, "resnet", distill.hinton()), "str"),
        (lambda s, t: distill.Distill(s, [], distill.hinton()), "0 teachers"),
        (lambda s, t: distill.Distill(s, t, distill.attention(["convv"])), "no module 'convv'"),
        (lambda s, t: distill.Distill(s, t, distill.attention({"1": "9"})), "no module '9'"),
        (
            lambda s, t: distill.Distill(
                torch.compile(s, backend="eager"), t, distill.fitnet_hint("1", "1", nn.Linear(8, 16))
            ),
            "wrapped already",
        ),
        (
            lambda s, t: (
                distill.fitnet_hint("1", "1", nn.Identity()) + distill.fitnet_hint("1", "3", nn.Identity())
            ),
            "two losses have a head on '1'",
        ),
        (lambda s, t: distill.freeze_above(nn.Sequential(nn.Identity(), s), "0", rows(2)[0]), "no trained"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(DistcompError, match=words):
        make(mlp(8), mlp(16, seed=1))
