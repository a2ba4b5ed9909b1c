"""Messages over sockets: in order, whole, into the right memory; and what a wait says where they fail to."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import struct
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp.collectives import in_rank_order
from distcomp.transports import sockets
from distcomp.transports.board import listen
from distcomp.transports.heartbeat import Heartbeat

carrier = pytest.importorskip(
    "distcomp.transports._sockets", reason="the C extension could not be built here"
)

DONE, LATE, BROKEN = range(3)


class Pair:
    """The two ends of one connection, each in a mesh of two."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            left = socket.create_connection(listener.getsockname())
            right, _ = listener.accept()
        self.meshes = carrier.open((-1, left.detach())), carrier.open((right.detach(), -1))

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for mesh in self.meshes:
            carrier.close(mesh)

    def exchange(self, end: int, sends: list[torch.Tensor], receives: list[torch.Tensor]):
        lines = (tuple((1 - end, one.data_ptr(), one.numel()) for one in some) for some in (sends, receives))
        return carrier.exchange(self.meshes[end], *lines)


def random_bytes(size: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


lengths = st.lists(
    st.one_of(st.integers(1, 300), st.sampled_from([16_370, 16_376, 16_377, 900_001])), max_size=6
)


@settings(max_examples=25, deadline=None)
@given(lengths, lengths, st.data())
def test_messages_arrive_whole_and_in_order(there, back, data) -> None:
    """Whoever posts first, and in however many calls."""
    sent = [[random_bytes(n, i) for i, n in enumerate(sizes)] for sizes in (there, back)]
    came = [[torch.zeros_like(one) for one in other] for other in reversed(sent)]
    steps = [(end, "send") for end in (0, 1) for _ in sent[end]]
    steps += [(end, "receive") for end in (0, 1) for _ in came[end]]
    order = data.draw(st.permutations(steps))
    with Pair() as pair:
        marks: list[list] = [[], []]
        taken = {(end, kind): 0 for end in (0, 1) for kind in ("send", "receive")}
        for end, kind in order:  # in each direction in order, between them as it comes
            i = taken[end, kind]
            taken[end, kind] += 1
            posted = ([sent[end][i]], []) if kind == "send" else ([], [came[end][i]])
            marks[end] += pair.exchange(end, *posted)
        for end in (0, 1):
            assert carrier.wait(pair.meshes[end], tuple(marks[end]), 20.0)[0] == DONE
    for end in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(sent[1 - end], came[end], strict=True))


def test_the_kernel_wakes_for_a_message_and_not_for_a_packet() -> None:
    """For the rest of the first message that is waited for, with its length of 8 bytes, or 16 kB of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        mine, _ = listener.accept()
    with other, mine.dup() as view:
        mesh = carrier.open((mine.detach(), -1))
        found = []
        for size in (1000, 10, 1 << 20):
            buffer = torch.zeros(size, dtype=torch.uint8)
            marks = carrier.exchange(mesh, (), ((0, buffer.data_ptr(), size),))
            found.append(view.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT))
            other.sendall(struct.pack("<Q", size) + bytes(size))
            assert carrier.wait(mesh, marks, 20.0)[0] == DONE
        carrier.close(mesh)
    assert found == [1008, 18, 16384]


@pytest.mark.parametrize(("told", "expected"), [(5, 3), (3, 5), (100, 2_000_000)])
def test_another_length_is_told_and_nothing_waits_for_it(told: int, expected: int) -> None:
    """Also where less comes than the kernel was to wake for."""
    buffer, wire = torch.zeros(expected, dtype=torch.uint8), random_bytes(told, 0)
    with Pair() as pair:
        marks = pair.exchange(1, [], [buffer])
        pair.exchange(0, [wire], [])
        state, peer, why, length = carrier.wait(pair.meshes[1], marks, 20.0)
    assert (state, peer, length) == (BROKEN, 0, told)
    assert f"rank 0 sent a message of {told} bytes" in sockets._complaint(state, peer, why, length)


@pytest.mark.parametrize("begun", [False, True])
def test_the_end_of_a_connection_ends_a_wait(begun: bool) -> None:
    """Before a message, and in the middle of one."""
    buffer = torch.zeros(1 << 20, dtype=torch.uint8)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        mine, _ = listener.accept()
    mesh = carrier.open((mine.detach(), -1))
    marks = carrier.exchange(mesh, (), ((0, buffer.data_ptr(), buffer.numel()),))
    if begun:
        other.sendall(struct.pack("<Q", buffer.numel()) + bytes(100))
    other.close()
    found = carrier.wait(mesh, marks, 20.0)
    carrier.close(mesh)
    assert found[0] == BROKEN
    assert sockets._complaint(*found) == "a connection was closed"


def test_a_message_that_does_not_come_is_named() -> None:
    buffer = torch.zeros(10, dtype=torch.uint8)
    with Pair() as pair:
        found = carrier.wait(pair.meshes[0], pair.exchange(0, [], [buffer]), 0.05)
    assert found[:2] == (LATE, 1)
    assert sockets._complaint(*found) == "no message from or to rank 1 in time"


def test_closing_ends_the_wait_of_another_thread() -> None:
    buffer, answers = torch.zeros(10, dtype=torch.uint8), []
    with Pair() as pair:
        marks = pair.exchange(0, [], [buffer])
        waits = threading.Thread(target=lambda: answers.append(carrier.wait(pair.meshes[0], marks, 60.0)))
        waits.start()
        carrier.close(pair.meshes[0])
        waits.join(20.0)
        assert not waits.is_alive()
    # it had begun to wait, or it came too late: the two ways in which a closed mesh refuses
    assert [found[0] for found in answers] in ([BROKEN], [])


def test_a_closed_mesh_takes_nothing_and_can_be_closed_again() -> None:
    with Pair() as pair:
        carrier.close(pair.meshes[0])
        with pytest.raises(RuntimeError, match="the connections were closed"):
            pair.exchange(0, [], [torch.zeros(1, dtype=torch.uint8)])


def test_a_fork_leaves_the_connections_to_its_parent() -> None:
    """It has no thread to end; the wait for it is bounded by the alarm."""
    sent, came = random_bytes(1000, 0), torch.zeros(1000, dtype=torch.uint8)
    with Pair() as pair:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            carrier.close(pair.meshes[0])
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        marks = pair.exchange(1, [], [came])
        pair.exchange(0, [sent], [])
        assert carrier.wait(pair.meshes[1], marks, 20.0)[0] == DONE
    assert torch.equal(sent, came)


def test_a_connection_that_does_not_exist_is_refused() -> None:
    with Pair() as pair, pytest.raises(ValueError, match="there is no connection 7"):
        carrier.exchange(pair.meshes[0], ((7, 0, 0),), ())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by Linux's /proc")
def test_the_thread_ends_with_the_mesh() -> None:
    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = count()
    with Pair():
        assert count() == before + 2
    for _ in range(500):  # a thread that was joined is a task for a moment longer
        if count() == before:
            break
        threading.Event().wait(0.01)
    assert count() == before


# ----------------------------------------------------------------------------------------------- connecting


def test_a_stranger_is_sent_away_and_the_ranks_meet() -> None:
    """Who does not know the token, says nothing, or says a rank that is none."""
    with listen() as listener:
        port = listener.getsockname()[1]
        cards = [{"hosts": ["127.0.0.1"], "port": port, "token": "ab" * 16}, {}]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        strangers[0].sendall(bytes(16) + (1).to_bytes(4, "little"))
        strangers[1].close()
        strangers[2].sendall(bytes.fromhex("ab" * 16) + (9).to_bytes(4, "little"))
        friend = socket.create_connection(("127.0.0.1", port))
        friend.sendall(bytes.fromhex("ab" * 16) + (1).to_bytes(4, "little"))
        found: dict[int, socket.socket] = {}
        sockets._connect(0, cards, listener, found)
        friend.sendall(b"x")
        assert {rank: line.recv(1) for rank, line in found.items()} == {1: b"x"}
        for line in (*strangers, friend, *found.values()):
            line.close()


def test_a_rank_that_does_not_connect_is_named(monkeypatch) -> None:
    monkeypatch.setattr(sockets, "_CONNECT_S", 0.05)
    with listen() as listener, pytest.raises(distcomp.DistcompError, match=r"ranks \[1, 2\] did not connect"):
        sockets._connect(0, [{"token": "00"}, {}, {}], listener, {})


def carrier_of_a_job(rank: int, size: int, chosen: str, broken: bool) -> tuple[str, list[str]]:
    """What carries rank by rank where rank 1 chooses ``chosen``, or reaches nobody; and the warnings."""
    reach = sockets.reach

    def unreachable(card):
        raise distcomp.DistcompError("port 1 of nowhere: cannot be reached")

    if rank == 1:
        os.environ[sockets.CARRIER] = chosen
        sockets.reach = unreachable if broken else reach
    group = dist.group.WORLD
    heartbeat = Heartbeat(group.get_group_store(), rank, size, f"carrier-{chosen}-{broken}")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            transport = sockets.connected(group, heartbeat, 30.0, group.get_group_store())
        transport.close()
        return type(transport).__name__, [str(one.message) for one in caught if "Gloo" in str(one.message)]
    finally:
        heartbeat.close()
        os.environ.pop(sockets.CARRIER, None)
        sockets.reach = reach


def test_all_ranks_use_what_one_of_them_needs(cluster) -> None:
    assert cluster(3).run(carrier_of_a_job, "sockets", False) == [("SocketP2P", [])] * 3
    assert cluster(3).run(carrier_of_a_job, "gloo", False) == [("GlooP2P", [])] * 3


def test_a_rank_that_reaches_nobody_is_named_on_all_and_gloo_carries(cluster, monkeypatch) -> None:
    said = cluster(3).run(carrier_of_a_job, "sockets", True)
    assert [name for name, _ in said] == ["GlooP2P"] * 3
    for _, (sentence,) in said:
        assert "rank 1: port 1 of nowhere" in sentence or "did not connect" in sentence
        assert "DISTCOMP_CARRIER=gloo" in sentence


def without_extension(rank: int, size: int) -> tuple[str, list[str]]:
    extension = sockets._extension
    if rank == 1:
        sockets._extension = lambda: None
    try:
        return carrier_of_a_job(rank, size, "sockets", False)
    finally:
        sockets._extension = extension


def test_a_rank_without_the_extension_is_named_on_all(cluster) -> None:
    for name, (sentence,) in cluster(2).run(without_extension):
        assert name == "GlooP2P"
        assert "rank 1: its installation has no C extension" in sentence


def test_a_choice_that_is_none_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(sockets.CARRIER, "pigeons")
    with pytest.raises(distcomp.DistcompError, match="DISTCOMP_CARRIER=pigeons is neither sockets nor gloo"):
        sockets.wanted()


# ------------------------------------------------------------------------------------------------ sums


class Ring:
    """Ranks of one process, each connected with each."""

    def __init__(self, size: int) -> None:
        lines = [[-1] * size for _ in range(size)]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for i, j in itertools.combinations(range(size), 2):
                lines[i][j] = socket.create_connection(listener.getsockname()).detach()
                lines[j][i] = listener.accept()[0].detach()
        self.meshes = [carrier.open(tuple(mine)) for mine in lines]

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        for mesh in self.meshes:
            carrier.close(mesh)

    def sum(self, rank: int, members: tuple[int, ...], x: torch.Tensor) -> tuple[tuple, torch.Tensor]:
        """Marks, and what must be kept until they are through."""
        scratch = torch.full(((len(members) - 1) * (x.numel() // len(members) + 2),), 7).to(x.dtype)
        kind, here = sockets._ADDED[x.dtype], members.index(rank)
        mesh = self.meshes[rank]
        return carrier.sum(mesh, members, here, kind, x.data_ptr(), x.numel(), scratch.data_ptr()), scratch


sizes = st.sampled_from([0, 1, 2, 3, 1_000, 65_536, 65_537, 200_001])
kinds = st.sampled_from(list(sockets._ADDED))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(sizes, kinds), min_size=1, max_size=4), st.data())
def test_sums_under_way_together_are_each_in_rank_order(asked, data) -> None:
    """Of all ranks or of some, with messages between them, whoever is ahead of whom."""
    everyone, two = (0, 1, 2), (0, 2)
    draws = torch.Generator().manual_seed(1)
    terms = [[(100 * torch.randn(n, generator=draws)).to(kind) for _ in everyone] for n, kind in asked]
    among = [data.draw(st.sampled_from([everyone, two])) for _ in asked]
    expected = [
        in_rank_order([term[rank] for rank in members]) for term, members in zip(terms, among, strict=True)
    ]
    note, came = random_bytes(300, 5), torch.zeros(300, dtype=torch.uint8)
    steps = [0, None, *range(1, len(asked))]  # None: rank 0 sends rank 2 the note
    turns = data.draw(st.permutations([rank for rank in everyone for _ in steps]))
    with Ring(3) as ring:
        marks, kept, begun = [[], [], []], [], [iter(steps) for _ in everyone]
        for rank in turns:
            step = next(begun[rank])
            if step is not None and rank in among[step]:
                got, scratch = ring.sum(rank, among[step], terms[step][rank])
                marks[rank] += got
                kept.append(scratch)
            elif step is None and rank == 0:
                marks[0] += carrier.exchange(ring.meshes[0], ((2, note.data_ptr(), 300),), ())
            elif step is None and rank == 2:
                marks[2] += carrier.exchange(ring.meshes[2], (), ((0, came.data_ptr(), 300),))
        for rank in everyone:
            assert carrier.wait(ring.meshes[rank], tuple(marks[rank]), 30.0)[0] == DONE
    assert torch.equal(came, note)
    for total, term, members in zip(expected, terms, among, strict=True):
        assert all(torch.equal(term[rank], total) for rank in members)


def test_a_sum_that_lacks_a_term_ends_with_whom_it_lacks() -> None:
    x = [torch.ones(90_000) for _ in range(3)]
    with Ring(3) as ring:
        marks, kept = ring.sum(0, (0, 1, 2), x[0])
        others = ring.sum(1, (0, 1, 2), x[1])
        assert carrier.wait(ring.meshes[0], marks, 0.2)[:2] == (LATE, 2)
        carrier.close(ring.meshes[2])
        assert carrier.wait(ring.meshes[0], marks, 30.0)[:2] == (BROKEN, 2)
        assert carrier.wait(ring.meshes[1], others[0], 30.0)[:2] == (BROKEN, 2)
        del kept


@pytest.mark.parametrize(
    ("members", "here", "kind"), [((0,), 0, "f"), ((0, 1), 2, "f"), ((0, 1), 0, "x"), ((0, 3), 0, "f")]
)
def test_a_sum_of_nothing_that_is_there_is_refused(members, here: int, kind: str) -> None:
    x = torch.zeros(10)
    with Ring(2) as ring, pytest.raises(ValueError, match=r"no (sum|connection)"):
        carrier.sum(ring.meshes[0], members, here, kind, x.data_ptr(), 10, x.data_ptr())


# ------------------------------------------------------------------------------------------------ in a job


def trained(rank: int, size: int, chosen: str, method: str) -> tuple[str, torch.Tensor]:
    os.environ[sockets.CARRIER] = chosen
    try:
        torch.manual_seed(0)  # a model whose sums are small: larger ones are added in Gloo's order over Gloo
        model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 7)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with distcomp.attach(model, optimizer, method) as handle:
            for step in range(4):
                optimizer.zero_grad()
                x = torch.randn(8, 20, generator=torch.Generator().manual_seed(10 * step + rank))
                model(x).square().mean().backward()
                optimizer.step()
            name = type(handle._session._transport).__name__
        return name, torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    finally:
        del os.environ[sockets.CARRIER]


def sums(rank: int, size: int, numel: int, dtype: torch.dtype) -> bool:
    """Whether the sum of random tensors has the bits of adding them in rank order."""
    group = dist.group.WORLD
    heartbeat = Heartbeat(group.get_group_store(), rank, size, f"sums-{numel}-{dtype}")
    transport = sockets.connected(group, heartbeat, 30.0, group.get_group_store())
    seeds = [torch.Generator().manual_seed(one) for one in range(size)]
    terms = [(100 * torch.randn(numel, generator=seed)).to(dtype) for seed in seeds]
    try:
        two = [transport.all_reduce(terms[rank].clone(), None) for _ in range(2)]
        return all(torch.equal(one.wait(), in_rank_order(terms)) for one in two)
    finally:
        transport.close()
        heartbeat.close()


@pytest.mark.parametrize("numel", [1, 5_000, 150_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_sum_is_in_rank_order(numel: int, dtype: torch.dtype, cluster) -> None:
    assert all(cluster(3).run(sums, numel, dtype))


@pytest.mark.parametrize(
    "method", ["qsgd:bits=4", "topk:ratio=0.05", "choco", "pqasgd:period=2", "powersgd:rank=2"]
)
def test_training_ends_with_the_same_bits_over_either(method: str, cluster) -> None:
    over = {chosen: cluster(3).run(trained, chosen, method) for chosen in ("sockets", "gloo")}
    assert {name for name, _ in over["sockets"]} == {"SocketP2P"}
    assert {name for name, _ in over["gloo"]} == {"GlooP2P"}
    for (_, a), (_, b) in zip(over["sockets"], over["gloo"], strict=True):
        assert torch.equal(a, b)


def left_alone(rank: int, size: int) -> str:
    """Rank 1 closes its connections in the middle of a request that the others have begun."""
    group = dist.group.WORLD
    heartbeat = Heartbeat(group.get_group_store(), rank, size, "left-alone")
    transport = sockets.connected(group, heartbeat, 30.0, group.get_group_store())
    wire = torch.zeros(1000, dtype=torch.uint8)
    try:
        if rank == 1:
            heartbeat.leave_note("ends in the middle")
            transport.close()
            return ""
        transport.all_gather(wire, [1000] * size, None).wait()
    except distcomp.PeerLost as error:
        with pytest.raises(RuntimeError, match="the connections were closed"):
            transport.all_gather(wire, [1000] * size, None)
        return str(error)
    finally:
        transport.close()
        heartbeat.close()
    return "nothing noticed"


def test_who_leaves_in_the_middle_is_named_by_all_who_stay(cluster) -> None:
    said = cluster(3).run(left_alone)
    assert said[1] == ""
    assert all("rank 1: ends in the middle" in one for one in (said[0], said[2]))
