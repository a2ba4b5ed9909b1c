"""A model's buffers, taken from rank 0 before each forward: as DDP does, but with a bound."""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from distcomp.attaching.session import Session
from distcomp.attaching.target import ignored_by
from distcomp.private_torch import joins


class FirstsBuffers:
    """Takes over DDP's broadcast of buffers (``broadcast_buffers=True``, running statistics of BatchNorm).

    DDP's own waits as long as its process group does, 30 minutes, and names nobody. Under ``join()``,
    where another rank than 0 may be the one to copy, and with a hook for buffers, it stays DDP's.
    """

    def __init__(self, ddp: DistributedDataParallel, session: Session) -> None:
        self._ddp = ddp
        self._session = session
        self._wanted = bool(ddp.broadcast_buffers) and not hasattr(ddp, "buffer_hook")

    def take(self) -> None:
        """Hold what rank 0 holds, where DDP would see to it in the forward that begins.

        Raises PeerLost naming the rank that does not come.
        """
        if not self._wanted:
            return
        ddp = self._ddp
        ddp.broadcast_buffers = joins(ddp)
        if ddp.broadcast_buffers or not ddp.require_forward_param_sync:
            return
        ignored = ignored_by(ddp)
        buffers = [buffer for name, buffer in ddp.module.named_buffers() if name not in ignored]
        if buffers:
            self._session.take_from_first(buffers)

    def close(self) -> None:
        """Let DDP do it again."""
        if self._wanted:
            self._ddp.broadcast_buffers = True
