"""Codistillation in training: what is told of shared examples, and the term that agrees with what was heard.

The clock, the line, checkpoints and failures are those of averaged models
(:class:`~distcomp.attaching.parameters.ParameterSync`). Weights are never written: each worker's network is
its own. The term's gradient is added at the end of each iteration's backward, so that clipping, scaling and
accumulation treat it as a part of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.optimizer import Optimizer

from distcomp.attaching.bucket import Scaler
from distcomp.attaching.parameters import ParameterSync
from distcomp.attaching.session import Session
from distcomp.attaching.target import Target
from distcomp.averaging.base import FragmentState
from distcomp.averaging.codistill import Codistillation, examples_digest, predictions_layout
from distcomp.averaging.gossip import tensors
from distcomp.distill.teachers import logits_of
from distcomp.errors import DistcompError
from distcomp.layout import Layout
from distcomp.methods.base import ByParameter
from distcomp.parametrize import evaluating
from distcomp.private_torch import at_backward_end
from distcomp.training import TrainingClock

AT_ONCE = 256
"""Shared examples in one forward."""


class PredictionSync(ParameterSync):
    """Lets workers agree on what they predict of ``shared`` examples, as ``codistillation`` says."""

    def __init__(
        self,
        target: Target,
        codistillation: Codistillation,
        session: Session,
        clock: TrainingClock,
        optimizer: Optimizer | None,
        seed: int,
        shared: Tensor,
        scaler: Scaler | None = None,
    ) -> None:
        self.codistillation = codistillation
        self._module = target.module
        self._shared = shared
        self._scaler = scaler
        self._term: Tensor | None = None
        super().__init__(target, codistillation, session, clock, optimizer, seed)
        self._rejoining.hands_over = False

    # ------------------------------------------------------------------------------- what is exchanged

    def _exchanged_layout(self) -> Layout:
        if not self.codistillation.own_models:
            return self._weights.layout
        rows = self.codistillation.check_rows(len(self._shared))
        return predictions_layout(rows, self._predictions(torch.arange(1)))

    def _own(self, fragment: FragmentState) -> Tensor:
        """What this worker tells: its predictions of the rows of this exchange, or its weights."""
        if not self.codistillation.own_models:
            return self._weights.read(fragment.layout)
        rows = self.codistillation.exchanged_rows(len(self._shared), self.iterations, self._seed)
        return self.codistillation.prepared(self._predictions(rows))

    def _predictions(self, rows: Tensor) -> Tensor:
        return predicted(self._module, self._shared, rows)

    def _begin_alike(self) -> None:
        """Networks begin as they are; nothing is sent."""
        self._start_fragments()

    def _start(self, fragment: FragmentState) -> None:
        fragment.start(torch.zeros(fragment.layout.numel, device=self._weights.device, dtype=torch.float32))

    def _begin(self, fragment: FragmentState) -> None:
        if not fragment.due(self.iterations):
            return
        self._rejoining.carry(fragment, lambda: self._exchange(fragment))

    def _apply(self, fragment: FragmentState, early: bool = False) -> None:
        if fragment.in_flight is None:
            return
        fragment.state = fragment.in_flight.result().state
        fragment.in_flight = None

    # ------------------------------------------------------------------------------------- the term

    def backward_ended(self) -> None:
        before = self.iterations
        super().backward_ended()
        if self.iterations == before and not self._pending:
            return
        if self._heard:
            # After DDP, which at its backward's end writes gradients over what anybody added before.
            at_backward_end(self._agree)

    @property
    def _heard(self) -> bool:
        (fragment,) = self._fragments
        return any(bool(count) for count in fragment.state["heard"].values())

    def _agree(self) -> None:
        """Add the gradient of the weighted term to those of the backward that has just ended."""
        step = self.iterations - 1
        weight = self.codistillation.weight_at(step)
        if not weight:
            return
        parameters = [p for p in self._weights.parameters.values() if p.requires_grad]
        with torch.enable_grad(), self.clock.no_sync():
            term = self._disagreement(step)
            scaled = weight * (term if self._scaler is None else self._scaler.scale(term))
            gradients = torch.autograd.grad(scaled, parameters, allow_unused=True)
        self._term = term.detach()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient.to(parameter.grad.dtype)
            elif gradient is not None:
                parameter.grad = gradient

    def _disagreement(self, step: int) -> Tensor:
        (fragment,) = self._fragments
        rows = self.codistillation.exchanged_rows(len(self._shared), fragment.last, self._seed)
        drawn = self.codistillation.batch_rows(len(rows), step, self._seed, self._session.rank)
        batch = self._shared[rows[drawn].to(self._shared.device)]
        # Statistics of the shared rows are not those of the data that this worker trains on.
        kept = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        outputs = logits_of(functional_call(_Forward(self._module), _inside(kept), batch)).float()
        return self.codistillation.disagreement(outputs, self._targets(fragment, len(rows), drawn, batch))

    def _targets(self, fragment: FragmentState, rows: int, drawn: Tensor, batch: Tensor) -> Tensor:
        """What the neighbours said of these rows, or what their checkpoints say now."""
        if self.codistillation.own_models:
            targets: Tensor = fragment.state["targets"].data
            return targets.view(rows, -1)[drawn.to(targets.device)]
        said = []
        with torch.no_grad(), evaluating(self._module):
            for model in tensors(fragment.state["replicas"]).values():
                weights = {
                    p.name: piece.view(p.shape).to(self._weights.parameters[p.name].dtype)
                    for p, piece in fragment.layout.pieces(model)
                }
                said.append(logits_of(functional_call(_Forward(self._module), _inside(weights), batch)))
        layout = Layout.of([("predictions", (said[0].numel() // said[0].shape[-1], said[0].shape[-1]))])
        return self.codistillation.targets([one.float().reshape(-1) for one in said], layout)

    # ----------------------------------------------------------------------------- what all agree on

    @contextmanager
    def averaged(self) -> Iterator[float]:
        """Each worker's network is its own, and they have no mean: the module stays as it is.

        Yields how far apart predictions are: the root mean square of this worker's logits of the shared
        examples less their mean over the workers.
        """
        self.settle()
        own = self.codistillation.prepared(self._predictions(torch.arange(len(self._shared))))
        mean = self._mean(own, Layout.of([("predictions", (1, own.numel()))]))
        yield float((own - mean).square().mean().sqrt())

    def finish(self) -> None:
        """Networks stay each worker's own; the exchange that is due is made."""
        self.settle()

    def report(self) -> dict[str, Any]:
        (fragment,) = self._fragments
        heard = max(int(count) for count in fragment.state["heard"].values())
        term = {} if self._term is None else {"disagreement": float(self._term)}
        return {**super().report(), "exchanges": fragment.exchanges, "heard": heard, **term}

    def expected_state(self, saved: Mapping[str, Any]) -> ByParameter:
        if saved["world_size"] != self._session.size:
            raise DistcompError(
                f"the checkpoint is of {saved['world_size']} codistilled networks, each of which is its "
                f"worker's own, and here are {self._session.size}; resume on as many ranks, or distill them "
                "into one first"
            )
        return super().expected_state(saved)

    def fingerprint(self, target: Target) -> str:
        """Networks may differ between ranks; what they predict does not."""
        if not self.codistillation.own_models:
            return super().fingerprint(target)
        (fragment,) = self._fragments
        return f"predictions {fragment.layout.slices[0].shape} of {examples_digest(self._shared)}"


@torch.no_grad()
def predicted(module: nn.Module, shared: Tensor, rows: Tensor) -> Tensor:
    """Outputs of a module in evaluation for some of the shared examples, float32. Its forward, not a call: no
    iteration begins."""
    with evaluating(module):
        outputs = [
            logits_of(module.forward(shared[part.to(shared.device)])).float()
            for part in torch.split(rows, AT_ONCE)
        ]
    return torch.cat(outputs)


class _Forward(nn.Module):
    """A module's forward without its hooks: a call of it would begin an iteration."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Tensor) -> Any:
        return self.inner.forward(batch)


def _inside(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"inner.{name}": tensor for name, tensor in weights.items()}


def check_shared(target: Target, method: Any, shared: Tensor | None) -> dict[str, str]:
    """What ranks compare of the shared examples. Raises DistcompError where codistillation lacks them, or
    cannot serve the model. Other methods have no use for them."""
    if shared is not None and not isinstance(shared, Tensor):
        raise DistcompError(
            f"shared examples are a {type(shared).__name__}; give one tensor, a row for each example"
        )
    if not isinstance(method, Codistillation):
        return {}
    if shared is None or shared.dim() == 0:
        raise DistcompError(
            "codistill exchanges predictions of examples that all ranks hold, and none were given: "
            "distcomp.attach(model, optimizer, method, shared=examples)"
        )
    if target.shards is not None:
        raise DistcompError(
            "codistill lets each rank train a network of its own, and an FSDP model is one network of all "
            "ranks; use a plain module or DistributedDataParallel"
        )
    normalised = [
        name
        for name, part in target.module.named_modules()
        if getattr(part, "running_mean", None) is not None
    ]
    if normalised and not method.own_models:
        raise DistcompError(
            f"codistill that exchanges checkpoints sends parameters alone, and {normalised[0]} evaluates by "
            "running statistics, which the copies here would lack; use exchanged='predictions', or a "
            "normalisation without them, such as GroupNorm"
        )
    rows = method.check_rows(len(shared))
    layout = predictions_layout(rows, predicted(target.module, shared, torch.arange(1)))
    return {"shared examples": examples_digest(shared), "predictions": str(layout.slices[0].shape)}
