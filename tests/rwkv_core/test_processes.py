"""Processes that work for this one: real ones, of a script of its own, for a fork server is one for a whole process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_settings import ROOT
from sessions import any_in_session

LOADED = """
import functools, os, time

@functools.cache
def table():
    with open(os.environ["LOG"], "a") as file:
        file.write(f"{os.getpid()}\\n")
    return [1]

def ready():
    table()

def failing():
    raise ValueError("no table")

def work(_):
    table()
    time.sleep(0.2)
    return os.getpid()

def long(_):
    print(os.getpid(), flush=True)
    time.sleep(600)
"""

SCRIPT = """
import sys
import loaded
from rwkv_core import processes

if __name__ == "__main__":
    with processes.pool(2, getattr(loaded, sys.argv[1])) as executor:
        print(*executor.map(getattr(loaded, sys.argv[2]), range(6)))
"""


@pytest.fixture
def begun(tmp_path, monkeypatch):
    (tmp_path / "loaded.py").write_text(LOADED)
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")

    def begin(*words):
        command = [sys.executable, tmp_path / "script.py", *words]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    return begin


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().split()


def none_left(running):
    """The server ends a moment after the one that began it."""
    while any_in_session(running.pid):
        time.sleep(0.05)


def test_what_all_need_is_loaded_once(begun, tmp_path):
    with begun("ready", "work") as running:
        told, errors = running.communicate()
    assert running.returncode == 0, errors
    assert len(set(told.split())) == 2
    assert len(log(tmp_path)) == 1  # by the server, whose memory the two share
    assert str(running.pid) not in {*log(tmp_path), *told.split()}


def test_what_the_server_could_not_load_fails_in_the_processes(begun):
    with begun("failing", "work") as running:
        _, errors = running.communicate()
    assert running.returncode == 1
    assert "ValueError: no table" in errors
    assert "BrokenProcessPool" in errors
    none_left(running)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_with_the_one_that_asked_for_them(begun, number):
    with begun("ready", "long") as running:
        for _ in range(2):
            running.stdout.readline()
        running.send_signal(number)
        assert running.wait() == -number
        none_left(running)
