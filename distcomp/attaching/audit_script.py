"""What do the steps of a training script send? The script runs as it is, as one of its ranks, and is stopped
after some steps."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from distcomp.attaching.audit import audit
from distcomp.attaching.audit_report import Audit
from distcomp.errors import DistcompError

WARM_UP = 2
"""Steps that are not counted: models are set up in them, and differences of weights begin plainly."""


class _Enough(BaseException):
    """Ends the script from inside its loop; no handler of errors takes it for one."""


class _Steps:
    """Audits the steps of the first optimizer that steps."""

    def __init__(self, wanted: int) -> None:
        self.seen = Audit()
        self.taken = 0
        self._wanted = wanted
        self._optimizer: Optimizer | None = None
        self._open = ExitStack()

    def stepped(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if self._optimizer is None:
            self._optimizer = optimizer
        if optimizer is not self._optimizer:
            return
        self.taken += 1
        if self.taken == WARM_UP:
            self.seen = self._open.enter_context(audit())
        elif self.taken == WARM_UP + self._wanted:
            raise _Enough

    def close(self) -> None:
        """The last step is that of the hook that ended it, and of no other."""
        self._open.close()
        self.seen.steps = self.taken - WARM_UP


def audit_script(script: Path, arguments: Sequence[str], steps: int) -> Audit:
    """Audit ``steps`` steps of ``script``, run in this process, which is one of its ranks. What it prints
    goes to standard error.

    Raises DistcompError where it takes fewer steps, or fails.
    """
    watched = _Steps(steps)
    hook = register_optimizer_step_post_hook(watched.stepped)
    try:
        with _as_main(script, arguments), redirect_stdout(sys.stderr):
            runpy.run_path(str(script), run_name="__main__")
    except (_Enough, SystemExit):
        pass
    except Exception as error:
        raise DistcompError(
            f"{script} failed after {watched.taken} steps ({type(error).__name__}: {str(error)[:200]}); let "
            "it run under torchrun first"
        ) from error
    finally:
        hook.remove()
        watched.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    if watched.taken < WARM_UP + steps:
        raise DistcompError(
            f"{script} took {watched.taken} steps with an optimizer, and {WARM_UP + steps} are needed; let "
            "it train longer, or audit fewer with --steps"
        )
    return watched.seen


@contextmanager
def _as_main(script: Path, arguments: Sequence[str]) -> Any:
    """The arguments and path of a script."""
    path = [str(script.resolve().parent), *sys.path]
    with mock.patch.object(sys, "argv", [str(script), *arguments]), mock.patch.object(sys, "path", path):
        yield
