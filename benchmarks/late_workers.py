"""What late and lost workers cost: goodput and loss of 1,024 workers in virtual time, and four hosts of an
emulated network of which one is killed and one joins.

``goodput``: the share of all worker-seconds (workers x virtual seconds) that were spent computing steps which
ended in an applied contribution, in its round or carried into the next one. Waiting, exchanging, being dead,
and steps that were dropped or died with their worker are not in it.

python -m benchmarks.late_workers                 # every simulated cell that is missing
python -m benchmarks.late_workers --account       # goodput alone, over more rounds
python -m benchmarks.late_workers --hosts         # the four hosts
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

from benchmarks._common import (
    SETTINGS,
    Cells,
    arguments_of,
    rank_command,
    rank_environment,
    write,
)
from benchmarks._places import EXAMPLES

WORKERS, PERIOD, ROUNDS = 1024, 32, 12
WIDTH, BATCH, RATE = 32, 8, 0.1
COMPUTE_S = 10.0
NETWORK = ("1gbit", "1ms")
FAILURES_PER_HOUR, REPLACED_S = 0.01, 600.0
CHANCE, FACTOR = 0.05, 10.0
METHOD = "diloco:period={period},outer_momentum=0.5,on_failure=({failing})"
GRACE_S = 2 * COMPUTE_S
FOREVER_S = 1e9
CONTINUING = f"continue:quorum={3 * WORKERS // 4},grace_s={GRACE_S:g}"

CELLS = {
    "no faults": ("nothing", CONTINUING),
    "slow steps": ("steps", CONTINUING),
    "slow workers": ("workers", CONTINUING),
    "slow steps, waiting for all": ("steps", f"continue:quorum={WORKERS // 2},grace_s={FOREVER_S:g}"),
    "slow steps, no quorum": ("steps", f"continue:grace_s={GRACE_S:g}"),
    "slow workers, waiting for all": ("workers", f"continue:quorum={WORKERS // 2},grace_s={FOREVER_S:g}"),
}
"""By name: what is slow, and what is done about it."""


def scenario(slow: str, seed: int) -> Any:
    """5 % stragglers of factor 10, in each step others or always the same, and 1 % failures an hour."""
    from distcomp.advice import Scenario
    from distcomp.advice.scenario import Slow

    if slow == "nothing":
        return Scenario(compute_s=COMPUTE_S, seed=seed)
    failing = {"failures_per_hour": FAILURES_PER_HOUR, "replaced_s": REPLACED_S}
    if slow == "steps":
        return Scenario(COMPUTE_S, seed, straggler_chance=CHANCE, straggler_factor=FACTOR, **failing)
    ranks = tuple(range(0, WORKERS, round(1 / CHANCE)))
    return Scenario(COMPUTE_S, seed, slow=(Slow(ranks, FACTOR),), **failing)


def simulated(slow: str, failing: str, seed: int = 0) -> dict[str, Any]:
    """One cell: train in rounds; what became of the worker-seconds, and the loss."""
    from distcomp.advice import RoundsSimulation, task_of
    from distcomp.methods import parse
    from distcomp.network import Fabric

    given = ["--width", str(WIDTH), "--batch", str(BATCH), "--steps", str(PERIOD * ROUNDS)]
    task = task_of(EXAMPLES / "digits.py", [*given, "--lr", str(RATE)])
    method = parse(METHOD.format(period=PERIOD, failing=failing))
    one = RoundsSimulation(task, method, Fabric.uniform(WORKERS, *NETWORK), scenario(slow, seed), seed)
    begin_s, curve = time.process_time(), []
    for _ in range(ROUNDS):
        one.round()
        curve.append([one.now_s, one.evaluate()["test_loss"]])
        print(one.rounds, curve[-1], one.goodput, one.account.members[-1], file=sys.stderr, flush=True)
    account = one.account
    return {
        "slow": slow, "on_failure": failing, "goodput": one.goodput, **one.evaluate(),
        "virtual_s": one.now_s, "contributions": account.contributions, "carried": account.carried,
        "dropped": account.dropped, "died": account.died, "joined": account.joined,
        "members": account.members, "cpu_s": time.process_time() - begin_s, "curve": curve,
    }  # fmt: skip


LONG = 100
"""Rounds of the account alone."""


def accounted(slow: str, failing: str, seed: int = 0) -> dict[str, Any]:
    """As :func:`simulated`, over more rounds, of the clock and the account alone: nobody trains."""
    from distcomp.advice import RoundsSimulation, task_of
    from distcomp.methods import parse
    from distcomp.network import Fabric

    task = task_of(EXAMPLES / "digits.py", ["--width", str(WIDTH)])
    method = parse(METHOD.format(period=PERIOD, failing=failing))
    fabric = Fabric.uniform(WORKERS, *NETWORK)
    one = RoundsSimulation(task, method, fabric, scenario(slow, seed), seed, trains=False)
    for _ in range(LONG):
        one.round()
    account = one.account
    return {
        "slow": slow, "on_failure": failing, "goodput": one.goodput, "virtual_s": one.now_s,
        "contributions": account.contributions, "carried": account.carried, "dropped": account.dropped,
        "died": account.died, "joined": account.joined, "mean_members": sum(account.members) / LONG,
    }  # fmt: skip


# ------------------------------------------------------------------------------------- four emulated hosts

HOSTS, LINK, PORT = 5, "100mbit", 29_517
TOGETHER, HOST_PERIOD = 20, 20
"""So many rounds all hold together once the fifth has joined."""
KILLED_AT, JOINS_AFTER = 8, 12
"""After so many rounds host 3 is killed, and host 4 joins."""
HOST_FAILING = "continue:quorum=2,grace_s=20"


def worker(settings: dict[str, Any]) -> None:
    """On each host: train, and print a line for each outer step."""
    import torch
    import torch.distributed as dist
    from torch.distributed import HashStore, TCPStore
    from torch.nn.functional import cross_entropy

    import distcomp
    from distcomp.advice import task_of

    torch.set_num_threads(1)
    host, address = settings["host"], settings["address"]
    task = task_of(EXAMPLES / "digits.py", ["--width", "64", "--batch", "16", "--lr", str(RATE)])
    store = TCPStore(address, PORT, None, host == 0, wait_for_workers=False)
    founders, joins = HOSTS - 1, host == HOSTS - 1
    if joins:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo", store=store, rank=host, world_size=founders)
    model, optimizer = task.model, task.optimizer(task.model.parameters())
    method = METHOD.format(period=HOST_PERIOD, failing=HOST_FAILING)
    join = f"{address}:{PORT}" if joins else None
    handle = distcomp.attach(model, optimizer, method, timeout_s=60.0, join=join)
    held, steps, last = handle.stats()["rounds"], 0, 0
    if joins:
        store.set("last", str(held + TOGETHER))
    while not last or held < last:
        inputs, targets = task.batch(host, HOSTS, steps)
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        steps += 1
        handle.state_dict()  # makes the exchange of this step now
        stats = handle.stats()
        if stats["rounds"] > held:
            held = stats["rounds"]
            if stats["worker"] not in stats["workers"]:
                continue  # it came late to this one, and its model carries what it learnt
            weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            said = {
                "host": host, "round": held, "workers": stats["workers"], "steps": steps,
                "iterations": stats["iterations"], **task.evaluate(model),
                "digest": hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16],
            }  # fmt: skip
            print(json.dumps(said), flush=True)
            last = int(store.get("last")) if store.check(["last"]) else 0
    handle.detach()
    store.add("ended", 1)
    while host == 0 and store.add("ended", 0) < HOSTS - 1:  # its store ends with it
        time.sleep(0.1)


def hosts() -> dict[str, Any]:
    """One of four hosts is killed, and a fifth joins; every outer step that was held."""
    from distcomp.network import Fabric, emulate

    said: list[dict[str, Any]] = []
    with emulate(Fabric.uniform(HOSTS, LINK)) as net:
        described, running = net.describe(), _Hosts(net, said)
        for host in range(HOSTS - 1):
            running.start(host)
        running.until(lambda: _held(said, HOSTS - 2) >= KILLED_AT)
        running.kill(HOSTS - 2)
        running.until(lambda: _held(said, 0) >= JOINS_AFTER)
        running.start(HOSTS - 1)
        running.until(lambda: len([one for one in said if one["host"] == HOSTS - 1]) >= TOGETHER // 2)
        last = _held(said, HOSTS - 1)
        running.until(lambda: all(_held(said, host) >= last for host in (0, 1, 2)))
        running.close()
    digests: dict[int, set[str]] = {}
    for one in said:
        digests.setdefault(one["round"], set()).add(one["digest"])
    of_first = [one for one in said if one["host"] == 0]
    joined = [one for one in said if one["host"] == HOSTS - 1]
    return {
        "network": described, "period": HOST_PERIOD, "on_failure": HOST_FAILING,
        "outer_steps_held": len(of_first), "outer_steps_due": of_first[-1]["steps"] // HOST_PERIOD,
        "outer_steps_lost": of_first[-1]["steps"] // HOST_PERIOD - len({one["round"] for one in of_first}),
        "steps_repeated": of_first[-1]["steps"] - of_first[-1]["iterations"],
        "rounds_in_which_models_differed": sum(len(found) > 1 for found in digests.values()),
        "killed_after": _held(said, HOSTS - 2), "joined_at": joined[0]["round"],
        "workers": [one["workers"] for one in of_first],
        "test_loss": [one["test_loss"] for one in of_first],
    }  # fmt: skip


def _held(said: list[dict[str, Any]], host: int) -> int:
    """The last outer step that a host has told of."""
    return max((one["round"] for one in said if one["host"] == host), default=0)


class _Hosts:
    """The programs of the hosts, and what they print as it comes."""

    def __init__(self, net: Any, said: list[dict[str, Any]]) -> None:
        import queue

        self.net, self.said = net, said
        self._lines: queue.Queue[str] = queue.Queue()
        self._jobs: dict[int, Any] = {}
        self._readers: list[Any] = []

    def start(self, host: int) -> None:
        import threading

        settings = {"host": host, "address": self.net.addresses[0]}
        env = {**rank_environment(settings), "PATH": os.environ["PATH"]}
        job = self.net.run_in(host, rank_command("late_workers"), env)
        rest = bytearray()

        def show(_: int, __: str, data: bytes) -> None:
            *lines, rest[:] = (rest + data).split(b"\n")
            for line in lines:
                self._lines.put(line.decode(errors="replace"))

        self._jobs[host] = job
        self._readers.append(threading.Thread(target=job.wait, kwargs={"show": show}, daemon=True))
        self._readers[-1].start()

    def kill(self, host: int) -> None:
        self._jobs.pop(host).kill(host)

    def until(self, reached: Any) -> None:
        while not reached():
            line = self._lines.get(timeout=300.0)
            if line.startswith("{"):
                self.said.append(json.loads(line))
                print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        for host in list(self._jobs):
            self.kill(host)
        for reader in self._readers:
            reader.join()


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--hosts", action="store_true", help="the four emulated hosts")
    parser.add_argument("--account", action="store_true", help="goodput alone, over more rounds")
    parser.add_argument("--cell", choices=list(CELLS), help="this one alone")
    wanted = parser.parse_args()
    plan = {
        "workers": WORKERS, "period": PERIOD, "rounds": ROUNDS, "compute_s": COMPUTE_S, "network": NETWORK,
        "straggler_chance": CHANCE, "straggler_factor": FACTOR, "failures_per_hour": FAILURES_PER_HOUR,
        "replaced_s": REPLACED_S, "method": METHOD, "width": WIDTH, "batch": BATCH, "rate": RATE,
    }  # fmt: skip
    if wanted.hosts:
        write("late_hosts", hosts())
        return
    if wanted.account:
        found = {name: accounted(*cell) for name, cell in CELLS.items()}
        write("late_account", {"plan": {**plan, "rounds": LONG}, "cells": found})
        return
    cells = Cells("late_workers", plan)
    for name in [wanted.cell] if wanted.cell else CELLS:
        cells.get(name, lambda name=name: simulated(*CELLS[name]))  # type: ignore[misc]


if __name__ == "__main__":
    if SETTINGS in os.environ:
        worker(json.loads(os.environ[SETTINGS]))
    else:
        main()
