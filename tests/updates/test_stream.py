"""A stream of versions, over a directory and a process group: the exact weights, or a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distcomp import DistcompError, calls, updates
from tests.updates.states import bits_of, same, stepped

KEY_EVERY = 5


def version(number: int) -> dict[str, Tensor]:
    """The trainer's weights of a version: whoever knows the number knows them."""
    state = {"w": bits_of((70, 30), torch.bfloat16, 1), "b": bits_of((30,), torch.float32, 2)}
    for step in range(number):
        state = {name: stepped(tensor, 0.05, step, 3) for name, tensor in state.items()}
    return state


def test_versions_are_chained():
    publisher, state = updates.Publisher(version(0), key_every=0), version(0)
    receiver = updates.Receiver(state)
    first, second, third = (publisher.publish(version(number)).difference for number in (1, 2, 3))
    assert receiver.receive(first)
    assert not receiver.receive(first)  # repeated
    with pytest.raises(
        updates.MissingUpdate, match="update 2 is missing between version 1, which is here, and up"
    ):
        receiver.receive(third)
    assert same(state, version(1))
    assert receiver.receive(second)
    assert receiver.receive(third)
    assert not receiver.receive(second)  # late
    receiver.check()
    assert same(state, version(3))
    state["b"][0] += 1
    with pytest.raises(DistcompError, match="have been changed since version 3"):
        receiver.check()
    receiver.forget()
    assert receiver.receive(publisher.key_frame())
    receiver.check()


def test_a_receiver_of_other_weights_is_told_at_the_first_update():
    publisher = updates.Publisher(version(0))
    receiver = updates.Receiver(version(3))
    with pytest.raises(updates.WrongBase, match="a key frame"):
        receiver.receive(publisher.publish(version(1)).difference)


def test_key_frames_come_when_they_are_due_or_asked_for():
    publisher = updates.Publisher(version(0), key_every=3)
    published = [publisher.publish(version(number), key=number == 5) for number in range(1, 7)]
    assert [each.key is not None for each in published] == [False, False, True, False, True, True]
    assert all(each.difference is not None for each in published)
    assert publisher.publish(version(7), difference=False).difference is None


def test_what_is_refused_was_not_published():
    publisher = updates.Publisher(version(0))
    with pytest.raises(DistcompError, match="b is in one version"):
        publisher.publish({"w": version(1)["w"]})
    state = version(0)
    updates.Receiver(state).receive(publisher.publish(version(1)).difference)
    assert same(state, version(1))


# --- a directory ---


def damage(directory: Path, number: int) -> str | None:
    """What becomes of the difference that leads to this version."""
    path = directory / f"{number:012}.difference.0-of-1.dcu"
    data = path.read_bytes()
    if number == 2:
        path.unlink()
        return "lost"
    if number == 7:
        path.write_bytes(data[: len(data) // 2])
        return "cut"
    if number == 12:
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        return "altered"
    if number == 14:
        shutil.copy(directory / f"{11:012}.difference.0-of-1.dcu", path)
        return "another one under its name"
    if number == 16:
        other = directory / f"{15:012}.difference.0-of-1.dcu"
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return "swapped"
    return None


def follow(rank, size, directory, last):
    """Rank 0 trains; the others follow, two of them from version 4 and 17 on. After every version: which each
    has, whether it is exact, and what it was told."""
    store, trains = updates.UpdateDirectory(directory), rank == 0
    publisher = updates.Publisher(version(0), key_every=KEY_EVERY) if trains else None
    begins = {1: 1, 2: 4, 3: 17}.get(rank, 0)
    state = version(0)
    receiver = updates.Receiver(state, number=0 if rank == 1 else None)
    seen = []
    for number in range(1, last + 1):
        if trains:
            store.write(publisher.publish(version(number), key=store.key_is_wanted()))
            damage(store.path, number)
        dist.barrier()
        if not trains and number >= begins:
            troubles = store.catch_up(receiver)
            exact = receiver.number is None or same(state, version(receiver.number))
            seen.append((number, receiver.number, exact, troubles))
        dist.barrier()
    return seen


def test_lost_cut_altered_and_swapped_updates_are_named_and_healed(cluster, tmp_path):
    followed = cluster(4).run(follow, str(tmp_path), 20)[1:]
    for seen in followed:
        assert all(exact for _, _, exact, _ in seen)
        # What is lost before anything newer is there cannot be known to be: nobody is told of version 2 yet.
        late = {number: troubles for number, have, _, troubles in seen if have != number and number != 2}
        assert set(late) <= {3, 7, 12, 14, 16}  # the next version heals: a key frame was asked for
        assert all(troubles and "a key frame was asked for" in troubles[-1] for troubles in late.values())
        assert seen[-1][:2] == (20, 20)
    first, second, third = followed
    told = {number: " ".join(troubles) for number, _, _, troubles in first if troubles}
    assert "update 2 is missing between version 1, which is here, and update 3" in told[3]
    assert "cut short" in told[7]
    assert "its checksum is wrong" in told[12]
    assert "holds update 11: they were swapped" in told[14]
    assert "holds update 15: they were swapped" in told[16]
    assert second[0][1] is not None
    assert third[0][1] == 17  # late ones are there at once


def test_old_objects_are_removed_and_a_late_receiver_begins_with_a_key_frame(tmp_path):
    store, publisher = updates.UpdateDirectory(tmp_path), updates.Publisher(version(0), key_every=2)
    for number in range(1, 9):
        store.write(publisher.publish(version(number)))
    store.prune(keep=1)
    assert [(each.number, each.key) for each in store.versions()] == [(8, True)]
    (tmp_path / "notes.txt").write_text("not ours")
    state = version(0)
    receiver = updates.Receiver(state)
    (told,) = store.catch_up(receiver)
    assert "updates 1 to 7 are missing" in told
    assert same(state, version(8))
    assert store.catch_up(receiver) == []


def test_the_way_of_the_fewest_bytes_is_taken(tmp_path):
    store, publisher = updates.UpdateDirectory(tmp_path), updates.Publisher(version(0), key_every=3)
    for number in range(1, 5):
        store.write(publisher.publish(version(number)))
    read = []
    original = store.read
    store.read = lambda stored: (read.append((stored.number, stored.key)), original(stored))[1]
    store.catch_up(updates.Receiver(version(0)))
    assert read == [(1, False), (2, False), (3, False), (4, False)]
    read.clear()
    store.catch_up(updates.Receiver(version(0), number=None))
    assert read == [(3, True), (4, False)]


def test_what_a_receiver_of_version_0_lacks_is_named(tmp_path):
    store, publisher = updates.UpdateDirectory(tmp_path), updates.Publisher(version(0), key_every=0)
    store.write([publisher.key_frame()])
    publisher.publish(version(1))  # and lost
    store.write(publisher.publish(version(2)))
    told, asked = store.catch_up(updates.Receiver(version(0)))
    assert "update 1 is missing between version 0, which is here, and update 2" in told
    assert "there is no way to version 2 yet" in asked


def test_a_trainer_that_resumes_goes_on_counting(tmp_path):
    store, publisher = updates.UpdateDirectory(tmp_path), updates.Publisher(version(0))
    assert store.newest == 0
    for number in (1, 2):
        store.write(publisher.publish(version(number)))
    state = version(0)
    receiver = updates.Receiver(state)
    store.catch_up(receiver)
    resumed = updates.Publisher(version(2), number=store.newest)
    store.write(resumed.publish(version(3)))
    assert store.catch_up(receiver) == []
    assert (receiver.number, same(state, version(3))) == (3, True)


# --- a group ---


def over_a_group(rank, size, last):
    """Rank 0 publishes; rank 2 begins with other weights, and loses what it has after version 3."""
    sent, state = [], version(0)
    if rank == 2:
        state["b"] += 1
    publisher = updates.Publisher(version(0), key_every=5) if rank == 0 else None
    receiver = updates.Receiver(state)
    for number in range(1, last + 1):
        if publisher is not None:
            sent.append(updates.publish_to_group(publisher, version(number)).key)
            continue
        assert updates.receive_from_group(receiver) == number
        assert same(state, version(number))
        if number == 3 and rank == 2:
            state["w"].zero_()
            receiver.forget()
    calls.disconnect()
    return sent


def test_the_trainer_sends_a_key_frame_to_those_that_need_it(cluster):
    sent, *_ = cluster(3).run(over_a_group, 6)
    assert sent == [True, False, False, True, True, False]


def nobody_publishes(rank, size):
    try:
        updates.receive_from_group(updates.Receiver(version(0)))
    except DistcompError as error:
        return str(error)
    finally:
        calls.disconnect()


def test_a_group_of_receivers_alone_is_told(cluster):
    assert all("no rank of the group publishes" in told for told in cluster(2).run(nobody_publishes))


def trainer_begins_at_0_again(rank, size):
    """Rank 1 has version 7 of an earlier run. What was sent whole, or what it has then."""
    if rank == 0:
        publisher = updates.Publisher(version(0), key_every=0)
        sent = [updates.publish_to_group(publisher, version(number)).key for number in (1, 2)]
        calls.disconnect()
        return sent
    state = version(5)
    receiver, have = updates.Receiver(state, number=7), []
    for number in (1, 2):
        have.append((updates.receive_from_group(receiver), receiver.number, same(state, version(number))))
    calls.disconnect()
    return have


def test_a_trainer_that_begins_at_0_again_is_followed(cluster):
    sent, have = cluster(2).run(trainer_begins_at_0_again)
    assert have == [(1, 1, True), (2, 2, True)]
    assert sent == [True, False]


def one_refuses_to_publish(rank, size, sharded_trainer):
    """The last rank receives; rank 0 publishes other names at first, a rank between them the right ones."""
    state, told = version(0), []
    publisher = updates.Publisher(version(0)) if rank < size - 1 else None
    receiver = updates.Receiver(state)
    for attempt in range(1 if sharded_trainer else 2):
        bad = {"w": version(1)["w"]} if rank == 0 and not attempt else version(1)
        try:
            if publisher is None:
                told.append(updates.receive_from_group(receiver))
            else:
                told.append(updates.publish_to_group(publisher, bad).number)
        except DistcompError as error:
            told.append(str(error))
    exact = same(state, version(receiver.number))
    calls.disconnect()
    return told, exact


def test_nobody_waits_for_a_trainer_that_refuses(cluster):
    ((refused, sent), _), ((told, number), exact) = cluster(2).run(one_refuses_to_publish, False)
    assert "b is in one version and not in the other" in refused
    assert "a rank that publishes refused to" in told
    assert (sent, number, exact) == (1, 1, True)


def test_nobody_waits_where_one_of_several_refuses(cluster):
    ((refused,), _), ((other,), _), ((told,), exact) = cluster(3).run(one_refuses_to_publish, True)
    assert "b is in one version and not in the other" in refused
    assert "another rank refused to publish its part of version 1" in other
    assert "a rank that publishes refused to" in told
    assert exact


def publish_after_other_versions(rank, size):
    state = version(0)
    try:
        if rank < 2:
            updates.publish_to_group(updates.Publisher(version(0), number=rank), version(1))
        else:
            updates.receive_from_group(updates.Receiver(state))
    except DistcompError as error:
        return str(error), same(state, version(0))
    finally:
        calls.disconnect()


def test_nobody_waits_for_trainers_that_publish_differently(cluster):
    *publishers, (told, exact) = cluster(3).run(publish_after_other_versions)
    assert all("ranks publish after versions [0, 1]; publish alike" in words for words, _ in publishers)
    assert "a rank that publishes refused to" in told
    assert exact
