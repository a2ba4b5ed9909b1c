"""A Horovod job with packed methods: real ranks, started by horovodrun (scripts/test-horovod builds it)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("horovod", reason="Horovod is not installed; scripts/test-horovod builds and tests it")


@pytest.fixture(scope="module", params=[2, 3])
def found(request):
    horovodrun = shutil.which("horovodrun", path=str(Path(sys.executable).parent))
    worker = Path(__file__).with_name("worker.py")
    command = [horovodrun, "--gloo", "-np", str(request.param), sys.executable, str(worker)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if "FOUND" in line)
    return json.loads(line.split("FOUND", 1)[1])


def test_every_request_is_answered(found):
    assert set(found["requests"].values()) == {True}, found["requests"]


def test_identity_is_what_horovod_does_itself(found):
    assert found["identity_apart"] <= (0 if found["size"] == 2 else 1e-6)


def test_methods_learn_with_fewer_bytes_and_replicas_stay_alike(found):
    for method, one in found["methods"].items():
        assert one["replicas_alike"], method
        assert one["last_loss"] < one["first_loss"], method
        assert one["bytes"] < found["exact_bytes"], method


def test_a_resumed_run_goes_on_bit_for_bit(found):
    assert found["resumed_alike"]


def test_a_step_that_is_not_finite_leaves_no_trace(found):
    assert found["poison_leaves_replicas_alike"]
    assert found["poison_is_skipped"]
    assert found["residuals_finite"]


def test_what_cannot_be_is_refused_on_every_rank(found):
    assert found["mismatch"] == "SettingsMismatch"
    assert found["option"] == "DistcompError"
    assert found["groups"] == "DistcompError"
