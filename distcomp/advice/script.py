"""How long does a step of a training script take, when is each bucket ready, and what does FSDP2 gather? The
script runs as it is, as the only rank, and is stopped after some steps."""

from __future__ import annotations

import ast
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from distcomp.advice.profile import clock
from distcomp.attaching.hook_dispatcher import dispatcher_of
from distcomp.attaching.observe import WARM_UP, ObservedSteps, WatchedBuckets, Watcher
from distcomp.attaching.observe_shards import (
    ObservedShardedSteps,
    ShardWatcher,
    WatchedStep,
    observed_shards,
)
from distcomp.errors import DistcompError
from distcomp.private_torch import fsdp_exchanges

REPEATS = 10
ALONE = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
}  # fmt: skip


def defines(script: Path, name: str) -> bool:
    """Whether a script has a name at its first level; it is read, not run."""
    try:
        statements = ast.parse(script.read_bytes()).body
    except (SyntaxError, ValueError) as error:
        raise DistcompError(f"{script} is no Python that can be read ({error}); correct it") from None
    return any(name in _names(node) for node in statements)


def _names(node: ast.stmt) -> list[str]:
    """What a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


ObservedTwice = tuple[ObservedSteps, ObservedSteps] | tuple[ObservedShardedSteps, ObservedShardedSteps]
"""The same twice, measured apart."""


def observe_script(script: Path, arguments: Sequence[str]) -> ObservedTwice:
    """The first and the second half of some steps of the loop that ``script`` runs with its
    DistributedDataParallel or FSDP2 model. What it prints goes to standard error; nothing is sent.

    Raises DistcompError where it takes no such step, or fails before it has taken enough.
    """
    if dist.is_initialized():
        raise DistcompError("this process is a rank already; start it without torchrun")
    observer = _Observer()
    try:
        with _as_main(script, arguments), observer.watching(), redirect_stdout(sys.stderr):
            runpy.run_path(str(script), run_name="__main__")
    except (_Enough, SystemExit):
        pass
    except Exception as error:
        raise DistcompError(
            f"{script} failed after {observer.taken} steps as the only rank ({type(error).__name__}: "
            f"{str(error)[:200]}); let it run under torchrun --nproc-per-node 1 first"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if observer.taken < WARM_UP + REPEATS:
        raise DistcompError(
            f"{script} took {observer.taken} steps with a DistributedDataParallel or FSDP2 model, and "
            f"{WARM_UP + REPEATS} are needed; let it train longer, or define training_task(arguments) as "
            "examples/digits.py does"
        )
    if observer.sharded:
        steps = observer.sharded[WARM_UP:]
        return observed_shards(steps[: REPEATS // 2]), observed_shards(steps[REPEATS // 2 :])
    timed = observer.steps[WARM_UP:]
    return observer.means(timed[: REPEATS // 2]), observer.means(timed[REPEATS // 2 :])


class _Enough(BaseException):
    """Ends the script from inside its loop; no handler of errors takes it for one."""


class _Observer:
    """Sits in the first DistributedDataParallel model that is made, or listens to FSDP2, and in the optimizer
    that steps on it."""

    def __init__(self) -> None:
        self.steps: list[WatchedBuckets] = []
        self.sharded: list[WatchedStep] = []
        self._began_s = self._stepping_s = 0.0
        self._watcher: Watcher | None = None
        self._shards = ShardWatcher(clock)
        self._parameters: set[int] = set()

    @property
    def taken(self) -> int:
        """Steps of either kind."""
        return len(self.steps) + len(self.sharded)

    def means(self, steps: Sequence[WatchedBuckets]) -> ObservedSteps:
        """Over some of the steps. Raises DistcompError where their buckets differ."""
        layouts = steps[0].layouts
        if self._watcher is None or not layouts or any(one.layouts != layouts for one in steps):
            raise DistcompError(
                "the gradients of a step do not come in the same buckets each time, so that there is no step "
                "to predict; let every step be one backward through the whole model"
            )
        return self._watcher.means(steps)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Until it ends, every model that is made is looked at, and nothing of distcomp's is attached."""
        make = DistributedDataParallel.__init__

        def made(ddp: DistributedDataParallel, *arguments: Any, **options: Any) -> None:
            make(ddp, *arguments, **options)
            if self._watcher is None:
                self._watcher = Watcher(ddp, clock)
                dispatcher_of(ddp).attached = self._watcher
                self._parameters = {id(parameter) for parameter in ddp.parameters()}
                self._began_s = clock()

        import distcomp
        from distcomp.attaching import handle

        hooks = (
            register_optimizer_step_pre_hook(self._steps),
            register_optimizer_step_post_hook(self._stepped),
        )
        try:
            with (
                mock.patch.object(DistributedDataParallel, "__init__", made),
                fsdp_exchanges(self._shards),
                # distcomp's first: it is looked up in handle when asked for, and then kept.
                mock.patch.object(distcomp, "attach", _unattached),
                mock.patch.object(handle, "attach", _unattached),
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _steps(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        self._stepping_s = clock()

    def _stepped(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if not self._steps_on_it(optimizer):
            return
        end_s = clock()
        if self._watcher is None:
            seen = tuple((what, moment_s - self._began_s) for what, moment_s in self._shards.seen)
            self.sharded.append(WatchedStep(seen, end_s - self._began_s, end_s - self._stepping_s))
            self._shards.seen.clear()
        else:
            self.steps.append(self._watcher.take(self._began_s, end_s))
        if self.taken == WARM_UP + REPEATS:
            raise _Enough
        self._began_s = clock()

    def _steps_on_it(self, optimizer: Optimizer) -> bool:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        if self._watcher is not None:
            return any(id(one) in self._parameters for one in parameters)
        return bool(self._shards.seen) and any(hasattr(one, "to_local") for one in parameters)


class _Unattached:
    """A handle that belongs to nothing: whatever a loop asks of it, it gives itself."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def _unattached(*arguments: Any, **options: Any) -> _Unattached:
    return _Unattached()


@contextmanager
def _as_main(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """The arguments, path and environment of a script that torchrun starts as the only rank."""
    argv, path = sys.argv, list(sys.path)
    with mock.patch.dict(os.environ, ALONE):
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.resolve().parent))
        try:
            yield
        finally:
            sys.argv, sys.path[:] = argv, path
