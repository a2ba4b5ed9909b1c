"""``init_process_group("mpi4py")``: MPI as a backend of torch.distributed, on a torch that was built without.

The collectives are MPI's own, non-blocking; DDP overlaps them with backward as it does Gloo's.
"""

# torch's stubs overload each collective with a convenience of their own, which calls these.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distcomp.errors import DistcompError
from distcomp.transports.mpi import BACKEND
from distcomp.transports.mpi.library import addends, library, raw, reduction
from distcomp.transports.mpi.progress import Flight, take_off
from distcomp.transports.types import Store

TensorList = list[Tensor]


def create_group(options: Any) -> MpiGroup:
    """The group of some of MPI's ranks (all, where torch names none), as torch.distributed asks for it.

    Raises DistcompError in a process to which MPI gives another rank than torch.distributed does.
    """
    MPI = library()
    world = MPI.COMM_WORLD
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    if len(ranks) > world.size or ranks[options.group_rank] != world.rank:
        raise DistcompError(
            f"this process is rank {ranks[options.group_rank]} of a torch.distributed group but rank "
            f"{world.rank} of {world.size} to MPI; start it with mpirun -n {options.group_size}, "
            "and let distcomp.init_process_group read the ranks"
        )
    tag = sum(map(ord, str(options.group_id))) % 30_000
    comm = world.Create_group(world.group.Incl(ranks), tag=tag)
    return MpiGroup(comm, options.store, options.timeout)


class MPIWork(dist.Work):
    """What torch.distributed waits for: a collective under way, whose future holds ``output``.

    ``finish`` puts what MPI brought where the caller wants it; it runs on the progress thread.
    """

    def __init__(
        self,
        requests: list[Any],
        buffers: object,
        output: TensorList,
        timeout: timedelta,
        finish: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._output = output
        self._timeout_s = timeout.total_seconds()
        self._finish = finish
        self._future: torch.futures.Future[TensorList] = torch.futures.Future()
        self._flight = take_off(requests, buffers, self._landed)

    @torch.no_grad()
    def _landed(self, flight: Flight) -> None:
        if flight.error is not None:
            self._future.set_exception(RuntimeError(f"MPI: {flight.error}"))  # type: ignore[arg-type]
            return
        if self._finish is not None:
            self._finish()
        self._future.set_result(self._output)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Raises RuntimeError when it fails, or is not done within the timeout (0: that of the group)."""
        self._flight.wait(timeout.total_seconds() or self._timeout_s)
        return True

    def is_completed(self) -> bool:
        return self._flight.done

    def is_success(self) -> bool:
        return self._flight.done and self._flight.error is None

    def get_future(self) -> torch.futures.Future[TensorList]:
        return self._future

    def result(self) -> TensorList:
        return self._output


class MpiGroup(dist.ProcessGroup):
    """The collectives of torch.distributed on one communicator, for tensors in main memory."""

    def __init__(self, comm: Any, store: Store, timeout: timedelta) -> None:
        super().__init__(comm.rank, comm.size)  # type: ignore[call-arg]
        self.comm = comm
        self._store = store
        self._timeout = timeout

    def getBackendName(self) -> str:  # noqa: N802 (the name that torch asks for)
        return BACKEND

    def name(self) -> str:
        return BACKEND

    def get_group_store(self) -> Store:
        return self._store

    def shutdown(self) -> None:
        """Nothing to close: the communicator lives as long as MPI, for freeing it would wait for the
        others."""

    def abort(self) -> None:
        """End the whole MPI job, which is what MPI can do about a rank that does not answer."""
        self.comm.Abort(1)

    def allreduce(self, tensors: TensorList, opts: Any = None) -> MPIWork:
        (x,) = tensors
        name, mean = _operation(opts)
        work = x.contiguous()
        request = self.comm.Iallreduce(library().IN_PLACE, addends(work), reduction(name, x.dtype))
        return self._fly(request, work, [x], lambda: _put(work, x, self.size() if mean else 1))

    def reduce(self, tensors: TensorList, opts: Any) -> MPIWork:
        (x,) = tensors
        name, mean = _operation(opts)
        work = x.contiguous()
        here = opts.rootRank == self.rank()
        data = (library().IN_PLACE, addends(work)) if here else (addends(work), None)
        request = self.comm.Ireduce(*data, reduction(name, x.dtype), opts.rootRank)
        return self._fly(request, work, [x], lambda: _put(work, x, self.size() if mean and here else 1))

    def reduce_scatter(self, outputs: TensorList, inputs: list[TensorList], opts: Any = None) -> MPIWork:
        return self._reduce_scatter_base(outputs[0], torch.cat([x.reshape(-1) for x in inputs[0]]), opts)

    def _reduce_scatter_base(self, output: Tensor, x: Tensor, opts: Any = None) -> MPIWork:
        name, mean = _operation(opts)
        sent, received = x.contiguous(), torch.empty(output.numel(), dtype=output.dtype)
        request = self.comm.Ireduce_scatter_block(addends(sent), addends(received), reduction(name, x.dtype))
        scale = self.size() if mean else 1
        return self._fly(request, (sent, received), [output], lambda: _put(received, output, scale))

    def broadcast(self, tensors: TensorList, opts: Any) -> MPIWork:
        (x,) = tensors
        work = x.contiguous()
        return self._fly(self.comm.Ibcast(raw(work), opts.rootRank), work, [x], lambda: _put(work, x))

    def allgather(self, outputs: list[TensorList], inputs: TensorList, opts: Any = None) -> MPIWork:
        (x,) = inputs
        sent, received = x.contiguous(), torch.empty(self.size(), x.numel(), dtype=x.dtype)
        request = self.comm.Iallgather(raw(sent), raw(received))
        return self._fly(request, (sent, received), outputs[0], lambda: _spread(received, outputs[0]))

    def _allgather_base(self, output: Tensor, x: Tensor, opts: Any = None) -> MPIWork:
        sent, received = x.contiguous(), output.contiguous()
        request = self.comm.Iallgather(raw(sent), raw(received))
        return self._fly(request, (sent, received), [output], lambda: _put(received, output))

    def gather(self, outputs: list[TensorList], inputs: TensorList, opts: Any) -> MPIWork:
        sent = inputs[0].contiguous()
        here = opts.rootRank == self.rank()
        received = torch.empty(self.size() if here else 0, sent.numel(), dtype=sent.dtype)
        into = outputs[0] if here else []
        request = self.comm.Igather(raw(sent), raw(received) if here else None, opts.rootRank)
        return self._fly(request, (sent, received), into, lambda: _spread(received, into))

    def scatter(self, outputs: TensorList, inputs: list[TensorList], opts: Any) -> MPIWork:
        (x,) = outputs
        here = opts.rootRank == self.rank()
        sent = torch.stack([tensor.reshape(-1) for tensor in inputs[0]]) if here else None
        received = torch.empty(x.numel(), dtype=x.dtype)
        request = self.comm.Iscatter(None if sent is None else raw(sent), raw(received), opts.rootRank)
        return self._fly(request, (sent, received), [x], lambda: _put(received, x))

    def alltoall_base(
        self, output: Tensor, x: Tensor, output_sizes: list[int], sizes: list[int], opts: Any = None
    ) -> MPIWork:
        sent, received = x.contiguous(), output.contiguous()
        row = x[:1].numel() * x.element_size()
        outgoing = [size * row for size in sizes or [x.shape[0] // self.size()] * self.size()]
        incoming = [size * row for size in output_sizes or [output.shape[0] // self.size()] * self.size()]
        (data, kind), (into, _) = raw(sent), raw(received)
        request = self.comm.Ialltoallv([data, outgoing, kind], [into, incoming, kind])
        return self._fly(request, (sent, received), [output], lambda: _put(received, output))

    def alltoall(self, outputs: TensorList, inputs: TensorList, opts: Any = None) -> MPIWork:
        sent = torch.cat([x.reshape(-1) for x in inputs])
        received = torch.empty(sum(x.numel() for x in outputs), dtype=sent.dtype)
        sizes = [[x.numel() * x.element_size() for x in each] for each in (inputs, outputs)]
        (data, kind), (into, _) = raw(sent), raw(received)
        request = self.comm.Ialltoallv([data, sizes[0], kind], [into, sizes[1], kind])
        cuts = [x.numel() for x in outputs]
        return self._fly(
            request, (sent, received), outputs, lambda: _spread(torch.split(received, cuts), outputs)
        )

    def send(self, tensors: TensorList, dst: int, tag: int = 0) -> MPIWork:
        work = tensors[0].contiguous()
        return self._fly(self.comm.Isend(raw(work), dst, tag), work, tensors)

    def recv(self, tensors: TensorList, src: int, tag: int = 0) -> MPIWork:
        (x,) = tensors
        work = x.contiguous()
        return self._fly(self.comm.Irecv(raw(work), src, tag), work, tensors, lambda: _put(work, x))

    def barrier(self, opts: Any = None) -> MPIWork:
        return self._fly(self.comm.Ibarrier(), None, [])

    # What torch 2.13 calls three of them by.
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base
    all_to_all_single = alltoall_base

    def _fly(
        self, request: Any, buffers: object, output: TensorList, finish: Callable[[], None] | None = None
    ) -> MPIWork:
        return MPIWork([request], buffers, output, self._timeout, finish)


def _put(brought: Tensor, wanted: Tensor, divisor: int = 1) -> None:
    """Into the caller's tensor, where it is not there already."""
    if divisor > 1:
        brought.div_(divisor)
    if brought.data_ptr() != wanted.data_ptr() or not wanted.is_contiguous():
        wanted.copy_(brought.view_as(wanted))


def _spread(brought: Sequence[Tensor] | Tensor, wanted: TensorList) -> None:
    for piece, x in zip(brought, wanted, strict=True):
        x.copy_(piece.view_as(x))


_NAMES = {
    dist.ReduceOp.SUM: "SUM",
    dist.ReduceOp.AVG: "SUM",
    dist.ReduceOp.PRODUCT: "PROD",
    dist.ReduceOp.MIN: "MIN",
    dist.ReduceOp.MAX: "MAX",
    dist.ReduceOp.BAND: "BAND",
    dist.ReduceOp.BOR: "BOR",
    dist.ReduceOp.BXOR: "BXOR",
}


def _operation(opts: Any) -> tuple[str, bool]:
    """MPI's name of a reduction (of a sum, where torch gives none), and whether it is a mean."""
    wanted = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
    for op, name in _NAMES.items():
        if wanted == op:
            return name, op == dist.ReduceOp.AVG
    raise DistcompError(f"MPI does not know the reduction {wanted}; use a sum, mean, minimum or maximum")
