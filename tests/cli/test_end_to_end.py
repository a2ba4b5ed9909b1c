"""A comparison on real processes: what is run, recorded, reported, and left behind when it is stopped."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distcomp import recording
from distcomp.cli import main

LEARNER = """\
import os, sys, time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import distcomp
import beside

assert __name__ == "__main__"
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(64, 8))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
handle = distcomp.attach(model, optimizer, seed=int(sys.argv[2]))
for step in range(1, 5):
    optimizer.zero_grad()
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
    if dist.get_rank() == 0:
        handle.log(step=step, train_s=step / 10, test_loss=1 / step, test_accuracy=step / 4)
told = ["method", os.environ["DISTCOMP_METHOD"], "argv", sys.argv[1:], beside.NAME, os.path.isabs(__file__)]
sys.stdout.write(" ".join(map(str, told)) + "\\n")  # in one piece: ranks share the terminal
print("at", os.getcwd(), file=sys.stderr)
handle.detach()
dist.destroy_process_group()
if os.environ["DISTCOMP_METHOD"] == "bf16" and os.environ["RANK"] == "1":
    raise RuntimeError("boom")
"""

ENDLESS = """\
import os, signal, sys
with open(sys.argv[1], "w") as fifo:
    fifo.write(f"{os.getpid()}\\n")
signal.pause()
"""


SOURCE = str(Path(recording.__file__).parent.parent)


def distcomp(*argv: str, where: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "distcomp", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=where, start_new_session=True,
        env=os.environ | {"PYTHONPATH": SOURCE},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's ignore it
    )  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    where = tmp_path_factory.mktemp("compared")
    (where / "learner.py").write_text(LEARNER)
    (where / "beside.py").write_text("NAME = 'beside'")
    process = distcomp(
        "emulate", "--ranks", "2", "--rate", "1gbit", "--methods", "ddp; bf16", "-o", "out",
        "learner.py", "--seed", "3", where=where,
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, (out, err)  # bf16 fails, on purpose
    return where, out, err


def test_the_network_is_told_before_and_the_table_after(compared: tuple[Path, str, str]) -> None:
    where, out, _ = compared
    assert out.startswith("2 ranks at 1gbit: ")
    assert re.search(r"^ddp \(2 runs\) +0\.2500 +100\.0 % ", out, flags=re.MULTILINE)
    assert re.search(r"^bf16 +0\.2500 +100\.0 % ", out, flags=re.MULTILINE)
    assert out.endswith("wrote out/report.html\n")
    assert (where / "out" / "report.html").exists()


def test_each_method_ran_in_the_script_s_own_environment(compared: tuple[Path, str, str]) -> None:
    where, _, _ = compared
    for directory, method in (("01-ddp", "ddp"), ("02-bf16", "bf16")):
        for rank in range(2):
            said = (where / "out" / directory / f"output{rank}.txt").read_text()
            assert f"method {method} argv ['--seed', '3'] beside True\n" in said
            assert f"at {where}\n" in said


def test_the_record_says_what_was_run_and_how_it_ended(compared: tuple[Path, str, str]) -> None:
    where, out, _ = compared
    runs = [recording.read_run(path) for path in recording.find_runs([where / "out"])]
    assert [run.method for run in runs] == ["ddp", "bf16", "ddp"]
    assert [run.about["exit_status"] for run in runs] == [0, 1, 0]
    for run in runs:
        assert run.about["ranks"] == 2
        assert run.about["argv"] == ["learner.py", "--seed", "3"]
        assert run.about["seed"] == 3
        assert run.about["network"]["asked"] == "2 ranks at 1gbit"
        assert run.about["network"]["real"] == ("NOT REAL PACKETS" not in out)
        assert [len(run.of_kind("step", rank)) for rank in (0, 1)] == [4, 4]
        sent = {one["payload_bytes"] for one in run.of_kind("step", 0)}
        assert sent == {520 * 4 if run.method == "ddp" else 520 * 2}


def test_a_method_that_fails_is_named_with_what_it_said(compared: tuple[Path, str, str]) -> None:
    _, _, err = compared
    assert "bf16 failed: rank 1 ended with status 1" in err
    assert "RuntimeError: boom" in err
    said = err[err.index("Traceback") :]
    assert "learner.py" in said
    assert "warm.py" not in said
    assert "runpy" not in said


def test_report_reads_it_again(compared: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    where, _, _ = compared
    assert main(["report", "--json", str(where / "out")]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["ddp"]["speed_up"] == 1.0
    assert rows["bf16"]["payload_bytes"]["mean"] * 2 == rows["ddp"]["payload_bytes"]["mean"]


def running(pid: int) -> bool:
    """A process that has ended may wait for init to take note of it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_ctrl_c_ends_everything_quietly(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDWR)
    process = distcomp(
        "emulate", "--ranks", "2", "--method", "ddp", "-o", "out", "endless.py", "fifo", where=tmp_path
    )
    told = b""
    while told.count(b"\n") < 2:
        assert select.select([fifo], [], [], 60)[0], "the ranks never started"
        told += os.read(fifo, 100)
    os.close(fifo)
    pids = [int(line) for line in told.split()]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out.count("\n") <= 3
    assert not any(running(pid) for pid in pids)


def test_an_emulation_that_is_killed_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    os.mkfifo(tmp_path / "fifo")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    fifo = os.open(tmp_path / "fifo", os.O_RDWR)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "distcomp", "emulate", "--no-packets", "--ranks", "1", "--method", "ddp",
            "-o", "out", "endless.py", "fifo",
        ],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": SOURCE, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert select.select([fifo], [], [], 120)[0], "the rank never started"
    (rank,) = os.read(fifo, 100).split()
    os.close(fifo)
    assert [path.name.startswith("distcomp-") for path in temporary.iterdir()] == [True]
    process.kill()
    process.wait()
    ended = os.pidfd_open(int(rank)) if running(int(rank)) else None
    assert ended is None or select.select([ended], [], [], 60)[0]
    for _ in range(600):  # its holder removes the folder last
        if not list(temporary.iterdir()):
            break
        select.select([], [], [], 0.1)
    assert not list(temporary.iterdir())


def test_run_is_torchrun_with_the_method_and_a_record(tmp_path: Path) -> None:
    (tmp_path / "learner.py").write_text(LEARNER)
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    process = distcomp(
        "run", "--nproc", "1", "--method", "qsgd:bits=4", "-o", "out", "learner.py", "--seed", "5",
        where=tmp_path,
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "method qsgd:bits=4 argv ['--seed', '5'] beside True" in out
    assert out.endswith("see it with: distcomp report out\n")
    run = recording.read_run(tmp_path / "out")
    assert (run.method, run.about["ranks"], run.about["seed"]) == ("qsgd:bits=4", 1, 5)
    assert len(run.of_kind("step", 0)) == 4


def test_a_cold_start_without_packets_says_so_and_records_the_same(tmp_path: Path) -> None:
    (tmp_path / "learner.py").write_text(LEARNER)
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    process = distcomp(
        "emulate", "--cold", "--no-packets", "--ranks", "1", "--method", "ddp", "-o", "out",
        "learner.py", "--seed", "3", where=tmp_path,
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "NOT REAL PACKETS" in out
    run = recording.read_run(tmp_path / "out" / "01-ddp")
    assert run.about["network"]["real"] is False
    assert len(run.of_kind("step", 0)) == 4
    assert "argv ['--seed', '3'] beside True" in (tmp_path / "out" / "01-ddp" / "output0.txt").read_text()


def test_a_script_that_python_refuses_is_told_as_python_tells_it(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import os\nimport os nonsense\n")
    process = distcomp("emulate", "--ranks", "1", "--method", "ddp", "-o", "out", "broken.py", where=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.count("\n") <= 3  # the network, and no table
    assert "SyntaxError" in err
    assert 'broken.py", line 2' in err
    assert "warm.py" not in err


STUBBORN = """\
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import distcomp

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(64, 8))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with distcomp.attach(model, optimizer, METHOD):
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 64)).square().mean().backward()
        optimizer.step()
dist.destroy_process_group()
"""


def said(where: Path, *argv: str) -> tuple[int, str, str]:
    process = distcomp(*argv, where=where)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


@pytest.mark.parametrize("given", ["distcomp.qsgd(bits=4)", '"qsgd:bits=4"'])
def test_a_script_that_names_its_method_is_never_labelled_with_another(tmp_path: Path, given: str) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN.replace("METHOD", given))
    script = ["--no-packets", "--ranks", "1", "-o", "out", "stubborn.py"]
    status, out, err = said(tmp_path, "emulate", "--methods", "ddp; bf16", *script)
    assert status == 2, (out, err)
    assert "stubborn.py attached " in err
    assert "and not ddp" in err
    assert "distcomp.attach(model, optimizer)" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["01-ddp"]  # the second never ran
    assert recording.read_run(tmp_path / "out" / "01-ddp").method not in ("ddp", "bf16")


def test_a_script_that_names_the_first_method_itself_is_refused_before_the_second_runs(
    tmp_path: Path,
) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN.replace("METHOD", "distcomp.qsgd(bits=4)"))
    script = ["--no-packets", "--ranks", "1", "-o", "out", "stubborn.py"]
    status, _, err = said(tmp_path, "emulate", "--methods", "qsgd:bits=4; bf16", *script)
    assert status == 2, err
    assert "names qsgd:bits=4 itself" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["01-qsgd-bits=4"]


def test_a_script_that_hands_the_environment_s_method_on_is_compared(tmp_path: Path) -> None:
    """As examples/digits.py does, with an option whose default is the variable."""
    handed = STUBBORN.replace("METHOD", 'os.environ["DISTCOMP_METHOD"]').replace(
        "import torch\n", "import os, torch\n", 1
    )
    (tmp_path / "handed.py").write_text(handed)
    script = ["--no-packets", "--ranks", "1", "-o", "out", "handed.py"]
    status, out, err = said(tmp_path, "emulate", "--methods", "bf16; qsgd:bits=4", *script)
    assert status == 0, (out, err)
    runs = [recording.read_run(path) for path in recording.find_runs([tmp_path / "out"])]
    assert [run.method for run in runs] == ["bf16", "qsgd:bits=4"]


def test_a_script_that_names_a_text_is_found_out_by_the_next_method(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN.replace("METHOD", '"bf16"'))
    script = ["--no-packets", "--ranks", "1", "-o", "out", "stubborn.py"]
    status, _, err = said(tmp_path, "emulate", "--methods", "bf16; qsgd:bits=4", *script)
    assert status == 2
    assert "attached bf16 and not qsgd:bits=4" in err
    assert not (tmp_path / "out" / "report.html").exists()


def test_run_records_what_was_attached_and_says_where_that_is_not_what_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN.replace("METHOD", "'qsgd:bits=4'"))
    status, out, err = said(tmp_path, "run", "--method", "bf16", "-o", "out", "stubborn.py")
    assert status == 2, (out, err)
    assert "attached qsgd:bits=4 and not bf16" in err
    assert "DISTCOMP_METHOD=bf16 asks for another method" in err
    run = recording.read_run(tmp_path / "out")
    assert (run.method, run.asked) == ("qsgd:bits=4", "bf16")


def test_a_script_that_attaches_nothing_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("print('trained')\n")
    status, out, err = said(tmp_path, "run", "--method", "bf16", "-o", "out", "plain.py")
    assert status == 2
    assert "trained" in out
    assert "attached no method" in err
    assert recording.read_run(tmp_path / "out").method == "bf16 (never attached)"
    status, out, err = said(
        tmp_path, "emulate", "--no-packets", "--ranks", "1", "--method", "ddp", "-o", "o2", "plain.py"
    )
    assert status == 2
    assert "attached no method" in err


OWN = """\
from distcomp.methods import Method, register
from distcomp.methods.basic import NoCommunication


@register(paper="none", wire="0", summable=True, biased=False)
def says_nothing() -> Method:
    '''Of the user's own.'''
    return NoCommunication()
"""


@pytest.mark.parametrize("warm", [True, False])
def test_a_method_of_one_s_own_stands_in_the_table(tmp_path: Path, warm: bool) -> None:
    (tmp_path / "learner.py").write_text(LEARNER)
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    (tmp_path / "own.py").write_text(OWN)
    start = [] if warm else ["--cold"]
    status, out, err = said(
        tmp_path, "emulate", "--no-packets", *start, "--ranks", "1", "--method", "says_nothing", "-o", "out",
        "--import", "own.py", "learner.py", "--seed", "3",
    )  # fmt: skip
    assert status == 0, (out, err)
    assert re.search(r"^says_nothing ", out, flags=re.MULTILINE)
    assert recording.read_run(tmp_path / "out" / "01-says-nothing").method == "says_nothing"
