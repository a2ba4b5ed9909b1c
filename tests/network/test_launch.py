"""Launching: what each rank is told, whose words are shown, and an end to every launch. No packets needed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distcomp.errors import DistcompError
from distcomp.network import UNSHAPED, Fabric, Net, Rack, Refused, emulate
from distcomp.network.launch import show_nothing
from tests.network.processes import active, wait_for_death

TELL = "import json, os; print(json.dumps(dict(os.environ)))"
FOREVER = "import signal; signal.pause()"
STRAY = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", {FOREVER!r}], start_new_session=True)
os.write(1, str(child.pid).encode())
"""


def python(*lines: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "\n".join(("import os, signal, sys; rank = int(os.environ['RANK'])", *lines)),
    ]


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with emulate(Fabric((1e6, 2e6, UNSHAPED), delay_s=0.005), packets=False) as standing:
        yield standing


def test_each_rank_is_told_who_it_is_and_what_to_hold_itself_to(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCOMP_THROTTLE_BPS", "left over from outside")
    own = [{"MINE": str(rank)} for rank in range(3)]
    result = net.launch(
        [sys.executable, "-c", TELL], env={"ALL": "1", "MINE": "x"}, per_rank_env=own, show=show_nothing
    )
    assert result.ok
    told = [json.loads(result.outputs[rank]) for rank in range(3)]
    for rank, variables in enumerate(told):
        assert variables["RANK"] == variables["MINE"] == str(rank)
        assert variables["WORLD_SIZE"] == "3"
        assert (variables["LOCAL_RANK"], variables["LOCAL_WORLD_SIZE"]) == ("0", "1")
        assert (variables["MASTER_ADDR"], variables["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
        assert variables["MASTER_PORT"] == told[0]["MASTER_PORT"]
        assert variables["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
        assert variables["ALL"] == "1"
        assert float(variables["DISTCOMP_DELAY_S"]) == 0.005
        assert "DISTCOMP_DEVICE" not in variables
    assert [variables.get("DISTCOMP_THROTTLE_BPS") for variables in told] == ["1000000.0", "2000000.0", None]


def test_what_is_not_real_says_so(net: Net) -> None:
    assert not net.real_packets
    assert net.delayed_by == "transport"
    assert "NOT REAL PACKETS" in net.describe()[0]
    assert "5ms one way, added by the transport" in net.describe()[1]
    for question in (net.counters, lambda: net.link(0, up=False)):
        with pytest.raises(DistcompError, match="without real packets"):
            question()


def test_racks_cannot_be_throttled_rank_by_rank() -> None:
    fabric = Fabric((1e6, 1e6), racks=(Rack((0,), 1e5), Rack((1,), 1e5)))
    with pytest.raises(Refused, match="uplink"), emulate(fabric, packets=False):
        pass


def test_rank_0_is_shown_and_the_others_only_when_they_fail(
    net: Net, capfd: pytest.CaptureFixture[str]
) -> None:
    say = "print('word of', rank, flush=True); print('complaint of', rank, file=sys.stderr, flush=True)"
    assert net.launch(python(say)).ok
    assert capfd.readouterr() == ("word of 0\n", "complaint of 0\n")
    result = net.launch(python(say, "sys.exit(7 * (rank == 2))"))
    assert result.exit_codes == {0: 0, 1: 0, 2: 7}
    assert result.first_failure == 2
    shown = capfd.readouterr()
    assert shown.out == "word of 0\n"
    assert "[rank 2] word of 2\n" in shown.err
    assert "[rank 2] complaint of 2\n" in shown.err
    assert "[rank 2] ended with status 7\n" in shown.err
    assert "[rank 1]" not in shown.err
    assert "word of 1" in result.outputs[1]
    assert net.launch(python("sys.exit('complaint of 0' if rank == 0 else 0)")).first_failure == 0
    assert capfd.readouterr().err == "complaint of 0\n", "not twice"


def test_when_a_rank_dies_those_who_do_not_notice_are_killed(net: Net) -> None:
    result = net.launch(
        python("signal.pause() if rank != 1 else os.kill(os.getpid(), 9)"), grace_s=0.2, show=show_nothing
    )
    assert result.exit_codes == {0: -9, 1: -9, 2: -9}
    assert result.first_failure == 1
    assert result.stopped == {0, 2}
    assert not result.timed_out


def test_those_who_notice_end_by_themselves(net: Net, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    notice = f"open({str(tmp_path / 'pipe')!r}, 'w' if rank == 1 else 'r').read() if rank < 2 else None"
    result = net.launch(
        python("import io", f"try: {notice}", "except io.UnsupportedOperation: sys.exit(3)", "sys.exit(rank)")
    )
    assert result.exit_codes == {0: 0, 1: 3, 2: 2}
    assert result.stopped == frozenset()


def test_a_launch_that_takes_too_long_is_ended(net: Net) -> None:
    result = net.launch([sys.executable, "-c", FOREVER], timeout_s=0.5, show=show_nothing)
    assert result.timed_out
    assert result.first_failure is None
    assert set(result.exit_codes.values()) == {-9}
    assert result.stopped == {0, 1, 2}


def test_what_a_program_leaves_behind_ends_with_the_launch(net: Net) -> None:
    result = net.launch(python(STRAY), show=show_nothing)
    assert result.ok
    assert active(int(result.outputs[rank]) for rank in range(3)) == []


def test_killing_a_rank_kills_what_it_started(net: Net) -> None:
    job = net.start(python(STRAY, "signal.pause()"))
    answers: dict[int, int] = {}

    def show(rank: int, stream: str, data: bytes) -> None:
        answers[rank] = int(data)
        if len(answers) == 3:
            job.kill(1)

    result = job.wait(grace_s=0.0, show=show)
    assert result.first_failure == 1
    assert active(answers.values()) == []


def test_a_flood_of_words_neither_blocks_nor_fills_the_memory(net: Net) -> None:
    result = net.launch(
        python("sys.stdout.write('x' * (3 << 20)); sys.stdout.write('end')"), show=show_nothing
    )
    assert result.ok
    assert all(len(text) == 1 << 20 and text.endswith("end") for text in result.outputs.values())


def test_an_interrupted_launch_leaves_nobody_behind(net: Net) -> None:
    job = net.start(python("print('here', flush=True)", "signal.pause()"))

    def interrupt(rank: int, stream: str, data: bytes) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.wait(show=interrupt)
    wait_for_death(job.pids.values())


def test_orders_that_cannot_be_carried_out_are_errors(net: Net) -> None:
    with pytest.raises(DistcompError, match=r"no-such-program.*cannot be started"):
        net.launch(["./no-such-program"])
    with pytest.raises(DistcompError, match="2 entries for 3 ranks"):
        net.launch(["true"], per_rank_env=[{}, {}])
    with pytest.raises(DistcompError, match="no host 3"):
        net.run_in(3, ["true"])
    assert net.launch(["true"]).ok, "and the network still stands"
