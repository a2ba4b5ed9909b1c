"""A student and its teacher: one call that gives a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distcomp.distill.objectives import Lesson, Objective
from distcomp.distill.taps import HEADS, Taps, install_heads, is_sharded_student, remove_heads
from distcomp.distill.teachers import Batch, NetworkOutput, Teacher, called, logits_of, teacher_of
from distcomp.errors import DistcompError
from distcomp.parametrize import evaluating
from distcomp.private_torch import at_backward_end
from distcomp.process_environment import read_environment
from distcomp.pruning.masks import unwrapped
from distcomp.randomness import Key
from distcomp.training import Listener, clock_of


class Distill(Listener):
    """``teach(batch, labels)`` is the loss of a student that learns from a teacher, too.

    ::

        model = DistributedDataParallel(student)
        teach = Distill(model, teacher, hinton(temperature=4, weight=0.5))
        teach(batch, labels).backward()

    The teacher is frozen, in evaluation, and no part of the student: nobody optimizes, averages, sends or
    saves it. It may be a network, a list of networks, or a :class:`CachedTeacher`. Under any wire method the
    student's gradients are exchanged as ever. Heads that a loss trains with the student (a regressor, a
    translator) become its submodules here; give the student before it is wrapped, or call
    :func:`install_heads` before.

    Schedules of weights and temperatures count the student's iterations; :meth:`state_dict` keeps the count.
    ``seed``: of a noisy teacher.

    Raises DistcompError for modules that are not there, a teacher that shares weights with the student, and
    heads that nobody would reduce.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | nn.Module | Sequence[nn.Module],
        loss: Objective,
        seed: int = 0,
    ) -> None:
        if not isinstance(loss, Objective):
            raise DistcompError(
                f"the loss is a {type(loss).__name__}; give one such as distcomp.distill.hinton()"
            )
        self.student = student
        self.loss = loss
        self.iterations = 0
        """Iterations of the student that are over."""
        self.last: dict[str, float] = {}
        """The terms of the last loss, by name."""
        self.logits: Tensor | None = None
        """What the student predicted in the last call, detached."""
        _refuse_shared(student, teacher)
        install_heads(student, loss.heads())
        pairs = loss.taps()
        self._taps = Taps(student, (ours for ours, _ in pairs), loss.heads())
        self.teacher = teacher_of(teacher)
        self.teacher.tap(theirs for _, theirs in pairs)
        self._seed = seed
        self._clock = clock_of(student)
        self._clock.listen(self)

    def __call__(
        self, batch: Batch, labels: Tensor | None = None, keys: Sequence[int] | None = None
    ) -> Tensor:
        """The loss of a batch: one input of the model, or a tuple of several.

        ``labels``: -1 for a row without one; None where the loss asks for none. ``keys``: the examples'
        numbers, for cached logits.
        """
        # The teacher first: under FSDP2 nothing else may run between the student's forward and its backward.
        taught = self.teacher.predict(batch, keys)
        logits = logits_of(called(self.student, batch))
        key = Key.of(self._seed, self.iterations).fold("distill", read_environment().rank)
        lesson = Lesson(NetworkOutput(logits, self._taps.taken()), taught, labels, self.iterations, key)
        terms = self.loss.terms(lesson)
        total = torch.stack([term.float() for term in terms.values()]).sum()
        if is_sharded_student(self.student) and not {"labels", "teacher"} & terms.keys():
            # FSDP2 begins its backward at the outputs: a loss of inner features alone would not start it.
            total = total + 0.0 * logits.float().sum()
        self.last = {name: float(term.detach()) for name, term in terms.items()}
        self.logits = logits.detach()
        if total.requires_grad:
            # At the backward's end, after what FSDP2 still reduces then: the iteration is over no earlier.
            arrived = self._clock.gradient_arrived
            total.register_hook(lambda _: at_backward_end(arrived))  # type: ignore[no-untyped-call]
        return total

    def backward_ended(self) -> None:
        self.iterations += 1

    def state_dict(self) -> dict[str, Any]:
        """The count of iterations. Heads are the student's; the teacher is in no checkpoint."""
        return {"iterations": self.iterations, "seed": self._seed}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from it. Raises DistcompError for what is none."""
        count, seed = (saved.get(name) for name in ("iterations", "seed"))
        if not isinstance(count, int) or isinstance(count, bool) or count < 0 or not isinstance(seed, int):
            raise DistcompError(
                f"a Distill's state is its iterations and its seed, and this says {str(dict(saved))[:80]}; "
                "load what state_dict() gave"
            )
        self.iterations, self._seed = count, seed

    def remove(self) -> None:
        """Take taps and heads off: the student is the plain network again. Wrap it anew, without heads."""
        self._taps.remove()
        self.teacher.remove()
        self._clock.leave(self)
        if self.loss.heads():
            remove_heads(self.student)

    def summary(self, batch: Batch | None = None) -> DistillSummary:
        """What is trained and sent, what is added for the training alone, and the teacher's part.

        ``batch``: to count the operations of a forward of either.
        """
        return summary_of(self, batch)


@dataclass(frozen=True)
class DistillSummary:
    """Parameters: the ``student``'s own; ``heads``, which are trained and sent with it and then dropped;
    the ``teacher``'s, which are never sent. Operations of a forward of one batch, where it was given."""

    student: int
    heads: int
    teacher: int
    student_flops: int | None = None
    teacher_flops: int | None = None

    @property
    def wire_factor(self) -> float:
        """By how much the heads raise what a gradient method sends in training."""
        return (self.student + self.heads) / self.student if self.student else 1.0

    def __str__(self) -> str:
        said = f"student {self.student:,} parameters"
        if self.heads:
            said += f", heads {self.heads:,} (training sends {self.wire_factor:.2f} times as much)"
        said += f"; teacher {self.teacher:,}, never sent"
        if self.student_flops and self.teacher_flops is not None:
            share = self.teacher_flops / self.student_flops
            said += f"; its forward costs {share:.2f} of the student's"
        return said


def summary_of(teach: Distill, batch: Batch | None) -> DistillSummary:
    """See :meth:`Distill.summary`."""
    inner = unwrapped(teach.student)
    heads = getattr(inner, HEADS, None)
    in_heads = sum(p.numel() for p in heads.parameters()) if heads is not None else 0
    own = sum(p.numel() for p in inner.parameters() if p.requires_grad) - in_heads
    teachers = teach.teacher.modules()
    taught = sum(p.numel() for network in teachers for p in network.parameters())
    if batch is None:
        return DistillSummary(own, in_heads, taught)
    flops = [_flops(inner, batch), sum(_flops(network, batch) for network in teachers)]
    return DistillSummary(own, in_heads, taught, *flops)


@torch.no_grad()
def _flops(network: nn.Module, batch: Batch) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # takes a second to import

    with FlopCounterMode(display=False) as counter, evaluating(network):
        network.forward(*batch) if isinstance(batch, tuple) else network.forward(batch)
    return int(counter.get_total_flops())


def _refuse_shared(student: nn.Module, teacher: Teacher | nn.Module | Sequence[nn.Module]) -> None:
    """Raise DistcompError for a teacher that has weights of the student: freezing it would freeze both."""
    if isinstance(teacher, Teacher):
        networks = list(teacher.modules())
    else:
        networks = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        if not all(isinstance(network, nn.Module) for network in networks):
            raise DistcompError(
                f"the teacher is a {type(teacher).__name__}; give a torch.nn.Module, or a list of them"
            )
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for network in networks for parameter in network.parameters()):
        raise DistcompError(
            "the teacher shares weights with the student, and it is frozen; give it a copy: "
            "copy.deepcopy(student)"
        )
