"""The ranks of the tests themselves."""

import os
import sys

from tests import forked


def modules(rank, size):
    return set(sys.modules)


def test_a_rank_begins_with_all_that_it_would_import(cluster):
    """Where the process that ranks are forked from cannot import it, nobody says so: each does it anew."""
    for there in cluster(2).run(modules):
        assert {"tests.warm", "torch._dynamo", "torch.distributed.fsdp"} <= there


def test_a_forked_program_tells_its_status_and_what_it_wrote(tmp_path):
    program = "import os, sys; print(os.getcwd(), os.environ['X']); print('e', file=sys.stderr); sys.exit(3)"
    done = forked.run(program, tmp_path, {**os.environ, "X": "y"})
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path} y\n", "e\n")
    assert "ZeroDivisionError" in forked.run("1 / 0", tmp_path, os.environ).stderr
