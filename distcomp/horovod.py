"""Inside a Horovod job: packed methods with error feedback, in place of Horovod's own all-reduce.

::

    import horovod.torch as hvd
    from distcomp.horovod import DistributedOptimizer

    hvd.init()
    optimizer = DistributedOptimizer(optimizer, model.named_parameters(), "qsgd:bits=4")

Horovod's ``compression=`` sees one tensor without a name and cannot send packed bytes; here its optimizer
asks for each gradient, and all of them are exchanged at once when the first is wanted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distcomp.attaching.observed import observer
from distcomp.errors import DistcompError, SettingsMismatch, require
from distcomp.layout import Layout, ParamSlice
from distcomp.methods import Method, parse
from distcomp.runtime.channel import Channel
from distcomp.runtime.driver import commit, context_of, exchange
from distcomp.runtime.executor import Executor
from distcomp.runtime.ledger import Ledger
from distcomp.runtime.saved_state import Fingerprint, Place, described, pack_state, unpack_state
from distcomp.runtime.states import States
from distcomp.transports.horovod import Horovod

Parameters = Iterable[tuple[str, Tensor]]


def DistributedOptimizer(  # noqa: N802  (the name that Horovod's users know)
    optimizer: Optimizer,
    named_parameters: Parameters,
    method: Method | str = "qsgd:bits=4",
    seed: int = 0,
    **options: Any,
) -> Optimizer:
    """``hvd.DistributedOptimizer`` whose gradients are agreed on by ``method``.

    ``options`` go to Horovod's, but for ``op``, ``compression``, ``groups`` and ``num_groups``: every method
    agrees on the mean. The result has ``.distcomp``, a :class:`GradientExchange`: its ``state_dict()`` holds
    the residuals. Parameters of one dimension count as biases.

    Raises DistcompError without Horovod and for options that belong to the method, SettingsMismatch where
    ranks ask for different methods.
    """
    taken = {"op", "compression", "groups", "num_groups"} & set(options)
    if taken:
        raise DistcompError(f"{', '.join(sorted(taken))} is the method's to decide; leave it out")
    hvd = require("horovod.torch", "horovod")
    named = list(named_parameters)
    exchange = GradientExchange(named, parse(method) if isinstance(method, str) else method, seed)
    wrapped: Any = hvd.DistributedOptimizer(optimizer, named_parameters=named, **options)
    # Horovod asks this for every gradient that is ready, and calls what it is given in synchronize().
    wrapped._allreduce_grad_async = lambda parameter: (exchange.wanted(parameter), None)
    wrapped.distcomp = exchange
    distributed: Optimizer = wrapped
    return distributed


class GradientExchange:
    """Agrees on all gradients at once. A step whose gradients are not finite leaves no trace."""

    def __init__(self, named_parameters: Parameters, method: Method, seed: int = 0) -> None:
        self._parameters = dict(named_parameters)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._layout = Layout(tuple(_segment(name, p) for name, p in self._parameters.items()))
        self._states = States(method)
        self._method = method
        self._observe = observer(method, self._parameters)
        self._seed = seed
        self._means: dict[str, Tensor] = {}
        self.iterations = 0
        self.ledger = Ledger()
        transport = Horovod()
        self._rank, self._size = transport.rank, transport.size
        shapes = [(param.name, param.shape) for param in self._layout.slices]
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
        self._place = Place(self._rank, tuple(range(self._size)))
        self._fingerprint = Fingerprint(described(method), f"{len(shapes)} tensors, digest {digest}")
        _agree(f"{method}, seed {seed}, {self._layout.slices}")
        self._channel = Channel(transport, 0, self.ledger)
        self._executor = Executor(self._channel, next(iter(self._parameters.values())).device, beside=False)

    def wanted(self, parameter: Tensor) -> Callable[[], Tensor]:
        """A function that gives the mean of the parameter's gradient, once in each step."""
        name = self._names[id(parameter)]

        def mean() -> Tensor:
            if name not in self._means:
                self._means = self._agreed()
            return self._means.pop(name)

        return mean

    @torch.no_grad()
    def _agreed(self) -> dict[str, Tensor]:
        buffer = torch.cat([_gradient(p) for p in self._parameters.values()])
        old = self._states.of(self._layout, buffer.device)
        context = context_of(self._channel, self._layout, self.iterations, self._seed, self._observe())
        agreed = exchange(self._method, buffer, old, context, self._executor)
        estimate = agreed.result().estimate
        commit(self._states, [agreed.aggregation])
        self.iterations += 1
        return {
            param.name: piece.view(param.shape).to(self._parameters[param.name].dtype)
            for param, piece in self._layout.pieces(estimate)
        }

    def state_dict(self) -> dict[str, Any]:
        """What this rank keeps between steps, and of what it is: save one for every rank."""
        content = {"iterations": self.iterations, "seed": self._seed, "state": self._states.by_parameter()}
        return pack_state(self._place, self._fingerprint, content)

    def load_state_dict(
        self, saved: Mapping[str, Any] | Sequence[Mapping[str, Any]], strict: bool = True
    ) -> None:
        """Go on from :meth:`state_dict`; with another number of ranks, from a list of all of them. Call it on
        every rank: all take over, or none; see :meth:`distcomp.Handle.load_state_dict`.

        Raises DistcompError for a part that is damaged, missing or (with ``strict``) of something else;
        SettingsMismatch on the other ranks, and where parts are of different steps.
        """
        try:
            fields = unpack_state(
                saved,
                self._place,
                self._fingerprint,
                lambda part: self._states.expected(self._layout, part["state"]),
                strict,
            )
        except DistcompError as error:
            _agree(f"a checkpoint that cannot be loaded ({error})")
            raise
        _agree(f"a checkpoint of iteration {fields['iterations']}, seed {fields['seed']}, {fields['method']}")
        self.iterations, self._seed = fields["iterations"], fields["seed"]
        self._states.load(fields["state"])


def _segment(name: str, parameter: Tensor) -> ParamSlice:
    role = "matrix" if parameter.dim() >= 2 else "bias"
    return ParamSlice(name, tuple(parameter.shape), 0, parameter.numel(), role)


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), device=parameter.device, dtype=torch.float32)
    return parameter.grad.reshape(-1).float()


def _agree(settings: str) -> None:
    """Raise SettingsMismatch on every rank unless all have the same settings."""
    hvd = require("horovod.torch", "horovod")
    gathered = hvd.allgather(torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8))
    own = torch.frombuffer(bytearray(json.dumps(settings).encode()), dtype=torch.uint8)
    if not torch.equal(gathered, own.repeat(hvd.size())):
        raise SettingsMismatch(
            f"ranks ask for different methods, seeds or parameters; this one for {settings[:200]}"
        )
