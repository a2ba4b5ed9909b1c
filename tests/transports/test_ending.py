"""A script's end waits for the threads that still free what they carried."""

import subprocess
import sys
import threading

import pytest

from distcomp.transports import ending

GLOO = """
import threading
from datetime import timedelta
import torch, torch.distributed as dist
import distcomp.attaching.session

class Slow:
    def __del__(self):
        print("begins", flush=True)
        freeing.set()
        for _ in range(30_000):
            torch.ones(1)  # made and freed: both let go of the interpreter's lock
        print("freed", flush=True)

store, groups, freeing = dist.HashStore(), {}, threading.Event()

def connect(rank):
    groups[rank] = dist.ProcessGroupGloo(dist.PrefixStore("x", store), rank, 2, timedelta(seconds=60))

other = threading.Thread(target=connect, args=(1,))
other.start()
connect(0)
other.join()
here, there = torch.ones(4), torch.ones(4)
future = groups[0].allreduce([here]).get_future()

def chained(slow):
    return future.then(lambda done, slow=slow: done.value())

result = chained(Slow())  # on Gloo's thread: the other rank is not there yet
groups[1].allreduce([there]).wait()
result.wait()
freeing.wait()
"""

OURS = """
import threading
import torch
import distcomp.attaching.session

begun = threading.Event()

def carry():
    print("begins", flush=True)
    begun.set()
    for _ in range(30_000):
        torch.ones(1)
    print("freed", flush=True)

threading.Thread(target=carry, name="distcomp-edge", daemon=True).start()
begun.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("script", [GLOO, OURS], ids=["gloo", "ours"])
def test_the_end_of_a_script_waits_for_threads_that_free_tensors(script, tmp_path):
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "begins\nfreed\n"), done.stderr


def test_a_thread_that_waits_for_ever_is_not_waited_for():
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="distcomp-edge", daemon=True)
    thread.start()
    looks = []
    seen = ending._at_work
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "PATIENCE_S", 10.0)
        patch.setattr(ending, "_at_work", lambda: looks.append(seen()) or looks[-1])
        ending.wait_for_threads()
    assert thread.native_id in looks[-1]
    assert len(looks) < 100  # of thousands, were it waited for
    over.set()
    thread.join()
