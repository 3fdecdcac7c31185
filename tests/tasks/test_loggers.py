"""TensorBoard and W&B as views of a run's metrics: what their own files hold.

Where a package is not installed, its test is skipped and says so; what a person is told then is tested either way.
"""

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import time

import pytest

from rwkv_core.config import TrackingConfig
from rwkv_core.errors import InputError
from tasks import loggers, mirror
from tasks.record import RunRecord


def names(*also):
    return TrackingConfig(experiment="tests", registered_model="tuned", also=also)


@pytest.fixture
def folder(tmp_path):
    facts = {"digest": "f00d", "started": time.time(), "params": {"seed": 1}, "base": {"path": "base.pth"}, "data": {}}
    RunRecord.fresh(tmp_path, **facts).write(tmp_path)
    return tmp_path


def add(folder, *steps):
    with (folder / mirror.LIVE).open("a") as file:
        for step in steps:
            now = int(time.time() * 1000)
            file.write(json.dumps({"time": now, "step": step, "metrics": {"train/loss": 5.0 - step / 4}}) + "\n")
            if step % 2 == 0:
                file.write(json.dumps({"time": now, "step": step, "metrics": {"valid/loss": 6.0 - step / 4}}) + "\n")


LIVE = """
import os, signal, sys, time
from pathlib import Path
from rwkv_core.config import TrackingConfig
from tasks import loggers
loggers._SECONDS = 0.1
folder = Path(sys.argv[1])
with loggers.Also(folder, TrackingConfig(experiment="tests", registered_model="tuned", also=(sys.argv[2],))):
    if sys.argv[3] == "killed":
        until = time.time() + 60
        while time.time() < until and not list(folder.glob(sys.argv[4])):
            time.sleep(0.1)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run(folder, name, end, proof=""):
    done = subprocess.run(
        [sys.executable, "-c", LIVE, str(folder), name, end, proof],
        env=os.environ | {"WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == (-9 if end == "killed" else 0), done.stdout
    assert "failed" not in done.stdout
    return done.stdout


@pytest.mark.slow
def test_tensorboard_has_each_point_once_after_a_kill(folder):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard here")
    add(folder, *range(6))
    run(folder, "tensorboard", "killed", "tensorboard/*")
    add(folder, *range(6, 9))
    run(folder, "tensorboard", "whole")
    read = events.EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(s, 5.0 - s / 4) for s in range(9)]
    assert [(e.step, e.value) for e in read.Scalars("valid/loss")] == [(s, 6.0 - s / 4) for s in range(0, 9, 2)]
    assert abs(read.Scalars("train/loss")[0].wall_time - time.time()) < 3600


def records(path):
    """What a .wandb file holds: 7 bytes, then LevelDB's log, blocks of 32 KiB of records with checksum, length and type."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.mark.slow
def test_wandb_offline_has_each_point_after_a_kill(folder):
    pytest.importorskip("wandb", reason="no wandb here")
    record = RunRecord.read(folder)
    add(folder, *range(6))
    run(folder, "wandb", "killed", "wandb/offline-run-*")
    add(folder, *range(6, 9))
    run(folder, "wandb", "whole")
    found, ids = {}, set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for entry in records(path):
            kind = entry.WhichOneof("record_type")
            if kind == "run":
                ids.add((entry.run.run_id, entry.run.project))
            elif kind == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in entry.history.item
                }
                for name in ("train/loss", "valid/loss"):
                    if name in row:
                        found.setdefault(name, []).append((row["_step"], row[name]))
    assert ids == {(record.id, "tests")}
    assert found["train/loss"] == [(s, 5.0 - s / 4) for s in range(9)]
    assert found["valid/loss"] == [(s, 6.0 - s / 4) for s in range(0, 9, 2)]


def test_what_is_not_installed_is_refused(monkeypatch):
    loggers.check(names())
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    with pytest.raises(
        InputError, match=r"tracking.also = wandb: it is not installed; pip install 'rwkv-flow\[wandb\]'"
    ):
        loggers.check(names("wandb"))


def test_a_logger_that_fails_stops_nothing(folder, capfd):
    """Its folder can't be made: a file stands there."""
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    (folder / "tensorboard").write_text("in the way")
    add(folder, 1)
    with loggers.Also(folder, names("tensorboard")):
        pass
    assert "tensorboard failed: " in capfd.readouterr().err
