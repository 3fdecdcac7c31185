"""How a stage ends: its exit code and its last words."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from miniature import wait_until
from project import ROOT

STAGE = """
import errno, os, signal
from rwkv_core.errors import InputError, Interrupted
from tasks import stage

def work():
    {body}

stage.main(work)
"""


def end(body, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")} | variables
    return subprocess.run(
        [sys.executable, "-c", STAGE.format(body=body)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("print('done')", 0, ""),
        ("raise InputError('7', 'must be even', 'give 8')", 1, "work: 7: must be even; give 8"),
        ("raise Interrupted(signal.SIGTERM, 'saved')", 143, "work: saved"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "work: stopped before there was anything to save"),
        ("raise OSError(errno.ENOSPC, 'No space', 'outputs/x')", 1, "free some space and run again"),
        ("open('/nowhere/at/all')", 1, "/nowhere/at/all: the file must be there"),
        ("raise OSError(errno.EIO, 'broken disk')", 70, "broken disk"),
        ("raise ZeroDivisionError('a defect')", 70, "ZeroDivisionError: a defect"),
    ],
)
def test_exit_codes_and_last_words(body, code, said):
    ended = end(body)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr
    assert ("Traceback" in ended.stderr) == (code == 70)


def test_it_is_told_to_stop_when_its_parent_dies():
    waits = STAGE.format(body="print('ready'); import time; time.sleep(60)")
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-u', '-c', {waits!r}], stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline()\n"
        "print(child.pid)"
    )
    done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(30)  # raises TimeoutExpired if it lives on


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", "nonsense", ""])
def test_without_a_server_that_answers_the_function_just_runs(url):
    ended = end("import sys; print('prefect' in sys.modules)", PREFECT_API_URL=url)
    assert ended.stdout.strip() == "False"


@pytest.mark.parametrize(("told", "code"), [("{}", -signal.SIGTERM), ('{"pid": 1, "ended": true}', 0)])
def test_it_is_told_to_stop_when_its_flow_run_dies(tmp_path, told, code):
    """Nobody holds the file's lock: its process is gone. One that has ended knows of its stages."""
    life = tmp_path / "life.json"
    life.write_text(told)
    assert end("import time; time.sleep(3)", RWKVFLOW_LIFE=str(life)).returncode == code


def test_it_goes_on_as_long_as_its_flow_run_lives(tmp_path):
    life = tmp_path / "life.json"
    with life.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert end("import time; time.sleep(3)", RWKVFLOW_LIFE=str(life)).returncode == 0


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_srun_is_not_told_to_stop_but_to_pass_it_on(tmp_path, asked):
    """A program stands in for it that does at signals as it does; the real one is in tests/flows/test_several_machines.py."""
    srun = tmp_path / "srun"
    srun.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys\n"
        "for killer in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
        "    signal.signal(killer, lambda *_: os._exit(137))\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))\n"
        "print(*sys.argv[1:], os.getpid() == os.getsid(0), flush=True)\n"
        "signal.pause()\n"
    )
    srun.chmod(0o755)
    code = "from tasks import stage; stage.launch('tasks.train')"
    environment = os.environ | {"RWKVFLOW_LAUNCH": f"{srun} --nodes 2 python"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "--nodes 2 python -m tasks.train True\n"
    wait_until(lambda: caught(process) & 1 << signal.SIGHUP - 1)  # the last that it begins to listen for
    process.send_signal(asked)
    assert process.wait(60) == 138


def caught(process):
    """The signals that a process listens for, as bits."""
    return int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16)
