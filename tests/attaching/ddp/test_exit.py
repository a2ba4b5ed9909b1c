"""A script that ends attached ends in peace, whatever the exchange thread is in the middle of."""

import subprocess
import sys

SCRIPT = """
import torch, torch.distributed as dist, distcomp
from distcomp.attaching import ddp

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
handle = distcomp.attach(model, None, "qsgd:bits=4")
take = ddp._Thread._take


def busy(*arguments):
    run = take(*arguments)  # the iteration is over, and the main thread goes on
    for _ in range(30_000):
        torch.ones(1)  # made and freed: both let go of the interpreter's lock
    print("through", flush=True)
    return run


ddp._Thread._take = busy
model(torch.ones(1, 4)).sum().backward()
"""


def test_a_script_that_ends_attached_waits_for_the_exchange_thread(tmp_path):
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "through\n"), done.stderr
