"""What goes wrong while training, and what becomes of it: hosts that die and come back, a worker that hangs,
a cable that is pulled.

Four hosts of an emulated network, on each a torchrun agent (``launchers/torchrun/elastic.sh``) with a worker
of ``examples/elastic.py``. ``--soak STEPS`` draws faults at random until so many steps are done.

python -m benchmarks.faults
python -m benchmarks.faults --soak 2000
"""

from __future__ import annotations

import os
import queue
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._common import arguments_of, write
from benchmarks._places import ROOT
from distcomp.errors import DistcompError
from distcomp.network import Fabric, Net, emulate
from distcomp.network.launch import Job
from distcomp.network.supervisor import descendants

SCRIPT = str(ROOT / "examples" / "elastic.py")
HOSTS, RATE = 4, "100mbit"
PATIENCE_S = 600.0
"""How long until a run counts as lost: a verdict, far above what anything takes."""
PAUSE_S = 5.0
"""Without a step for so long, training was interrupted; a step takes a hundredth of it."""
TIMEOUT_S = 20.0
"""What the workers are told to wait for each other; the link is down for less."""
EVERY = 20
"""Steps from one checkpoint to the next."""


@dataclass(frozen=True)
class Step:
    at_s: float
    number: int
    workers: int
    loss: float


@dataclass
class Fault:
    """A row of the table. Seconds count from the fault; None where nobody was named."""

    name: str
    named: str | None = None
    detected_s: float | None = None
    went_on_s: float = 0.0
    workers: int = 0
    lost_steps: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0


@dataclass
class Run:
    """The hosts' programs, and what their workers print, as it comes."""

    net: Net
    argv: list[str]
    env: dict[str, str]
    jobs: dict[int, Job] = field(default_factory=dict)
    readers: list[threading.Thread] = field(default_factory=list)
    lines: queue.Queue[tuple[float, str]] = field(default_factory=queue.Queue)
    steps: list[Step] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def start(self, host: int) -> None:
        own = {"IS_HOST": str(int(host == 0)), "LOCAL_ADDR": self.net.addresses[host]}
        job = self.net.run_in(host, self.argv, {**self.env, **own})
        rest = bytearray()

        def show(_: int, __: str, data: bytes) -> None:
            *lines, rest[:] = (rest + data).split(b"\n")
            for line in lines:
                self.lines.put((time.monotonic(), line.decode(errors="replace")))

        self.jobs[host] = job
        self.readers.append(threading.Thread(target=job.wait, kwargs={"show": show}, daemon=True))
        self.readers[-1].start()

    def kill(self, host: int) -> None:
        """The agent and its worker, at once, as when the power fails."""
        self.jobs.pop(host).kill(host)

    def stop_worker(self, host: int) -> None:
        """SIGSTOP to the worker that the host's agent has started: it hangs, and its connections stay."""
        (worker,) = (pid for pid in descendants(self.jobs[host].pids[host]) if b"--nnodes" not in _argv(pid))
        os.kill(worker, signal.SIGSTOP)

    def pull_cable(self, host: int) -> None:
        """And put it in again, ten seconds later."""
        self.net.link(host, up=False)
        time.sleep(10.0)
        self.net.link(host, up=True)

    def until(self, reached: Callable[[str], bool]) -> None:
        """Read on until the line that is waited for, or the step that has just been added."""
        while True:
            try:
                at_s, line = self.lines.get(timeout=PATIENCE_S)
            except queue.Empty:
                raise DistcompError(
                    f"nothing was said for {PATIENCE_S:g} s after: {self.said[-20:]}"
                ) from None
            told = re.search(r"step (\d+) workers (\d+) test loss ([\d.]+|nan)", line)
            if told:
                self.steps.append(Step(at_s, int(told[1]), int(told[2]), float(told[3])))
            else:
                self.said.append(line)
            if reached(line):
                return

    def train(self, steps: int) -> None:
        """So many steps more."""
        wanted = len(self.steps) + steps
        self.until(lambda _: len(self.steps) >= wanted)

    def close(self) -> None:
        for host in list(self.jobs):
            self.kill(host)
        for reader in self.readers:
            reader.join()


DIES, BACK = "a host dies (SIGKILL)", "a host comes back"
FAULTS = {
    "a cable is pulled for 10 s": Run.pull_cable,
    "a worker hangs (SIGSTOP)": Run.stop_worker,
    DIES: Run.kill,
    BACK: Run.start,
}


def _argv(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b"--nnodes"


def survive(run: Run, name: str, host: int) -> Fault:
    """Let it happen to a host, and read on until as many workers as can train again, after a pause."""
    fault, workers = Fault(name), HOSTS - (name == DIES)
    begin_s = time.monotonic()
    FAULTS[name](run, host)

    def goes_on(line: str) -> bool:
        named = re.search(r"ranks? [\d, ]+ died or hangs? \([^)]*\)", line)
        if named and fault.named is None:
            fault.named, fault.detected_s = named[0], time.monotonic() - begin_s
        before, after = run.steps[-2:]
        paused = after.workers != before.workers or after.at_s - before.at_s > PAUSE_S
        return after.at_s > begin_s and after.workers == workers and paused

    run.until(goes_on)
    before, after = run.steps[-2:]
    fault.went_on_s, fault.workers = after.at_s - begin_s, after.workers
    fault.lost_steps = before.number + 1 - after.number
    fault.loss_before, fault.loss_after = before.loss, after.loss
    print(asdict(fault), file=sys.stderr, flush=True)
    return fault


def agents(net: Net, checkpoints: str) -> Run:
    """Between two and four hosts, started on all; returns when they train."""
    env = {
        "NODES": f"2:{HOSTS}", "MASTER_PORT": "29400", "LAST_CALL_S": "5",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    script = [SCRIPT, "--checkpoints", checkpoints, "--every", str(EVERY), "--timeout", str(TIMEOUT_S)]
    run = Run(net, [str(ROOT / "launchers/torchrun/elastic.sh"), *script, "--steps", "1000000"], env)
    for host in range(HOSTS):
        run.start(host)
    run.until(lambda _: bool(run.steps) and run.steps[-1].workers == HOSTS)
    run.train(2 * EVERY)
    return run


def each(net: Net, checkpoints: str) -> list[Fault]:
    """Every fault once, with a while of training in between."""
    run = agents(net, checkpoints)
    found = []
    with closing(run):
        for name in FAULTS:
            found.append(survive(run, name, HOSTS - 1))
            run.train(2 * EVERY + 7)
    return found


def soak(net: Net, checkpoints: str, steps: int, seed: int) -> dict[str, Any]:
    """Faults drawn at random, until ``steps`` are done. A host that is gone comes back with the next."""
    draw = random.Random(seed)
    run = agents(net, checkpoints)
    found = []
    with closing(run):
        while run.steps[-1].number < steps:
            run.train(draw.randint(2 * EVERY, 8 * EVERY))
            gone = set(range(HOSTS)) - set(run.jobs)
            name = BACK if gone else draw.choice([name for name in FAULTS if name != BACK])
            host = gone.pop() if gone else draw.randrange(1, HOSTS)  # host 0 keeps the list of the others
            found.append(survive(run, name, host))
    done = run.steps
    return {
        "steps": done[-1].number,
        "faults": [asdict(one) for one in found],
        "steps_trained_twice": len(done) - done[-1].number,
        "first_loss": done[0].loss,
        "last_loss": done[-1].loss,
    }


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--soak", type=int, metavar="STEPS", help="random faults for so many steps instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random faults")
    wanted = parser.parse_args()
    about = {"hosts": HOSTS, "rate": RATE, "timeout_s": TIMEOUT_S, "checkpoint_every": EVERY}
    with tempfile.TemporaryDirectory() as folder, emulate(Fabric.uniform(HOSTS, RATE)) as net:
        about["network"] = net.describe()
        if wanted.soak:
            write("soak", {**about, **soak(net, folder, wanted.soak, wanted.seed)}, wanted.seed)
        else:
            write("faults", {**about, "faults": [asdict(one) for one in each(net, folder)]})


if __name__ == "__main__":
    main()
