"""`python -m tasks.train` as two processes: one set of files, one end for both, and a kill loses nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from project import copy_of, make

from rwkv_core import checkpoint
from rwkv_core.data.binidx import Documents

pytestmark = pytest.mark.slow
OUTPUTS = ("adapter.pth", "history.csv", "valid.csv")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A project whose training two processes share, and what it leaves undisturbed."""
    project = make(tmp_path_factory.mktemp("shared"), tracked=False)
    project.set(
        train__parallel__strategy="ddp", train__parallel__devices=2, train__checkpoint_every=2, train__epochs=None,
        train__steps=40, adapter__dropout=0.2,
    )  # fmt: skip
    project.stage("prepare")
    project.said = project.stage("train").stdout
    project.expected = bits(project)
    return project


@pytest.fixture
def project(prepared):
    for name in (*OUTPUTS, "run.json", "metrics.json"):
        (prepared.root / "outputs/train" / name).unlink(missing_ok=True)
    return prepared


def bits(project):
    return {name: (project.root / "outputs/train" / name).read_bytes() for name in OUTPUTS}


class Running:
    """A training that has begun to learn."""

    def __init__(self, project, command=("-m", "tasks.train")):
        self.log = (project.root / "log").open("wb+")
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=project.root, env=project.environment, stdout=self.log, stderr=self.log,
            start_new_session=True,
        )  # fmt: skip

    def said(self):
        self.log.seek(0)
        return self.log.read().decode()

    def wait_for(self, text):
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)

    def others(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self):
        """The exit code, when all of its processes have ended."""
        others = self.others()
        code = self.process.wait()
        psutil.wait_procs(others)
        return code


def test_the_first_process_alone_speaks(prepared):
    assert prepared.said.count("training 2304 parameters") == prepared.said.count("held-out loss") == 1
    assert "2 processes" in prepared.said
    assert prepared.json("outputs/train/metrics.json")["steps"] == 40
    assert len(list((prepared.root / ".rwkvflow/runs").iterdir())) == 1
    assert not list((prepared.root / ".rwkvflow").rglob("last.ckpt"))


@pytest.mark.parametrize("whom", ["the first", "all"])
def test_a_signal_stops_all_after_the_same_step(whom, project):
    running = Running(project)
    running.wait_for("step 1/40")
    if whom == "all":  # as Ctrl+C reaches all of a terminal's processes
        os.killpg(running.process.pid, signal.SIGINT)
    else:
        running.process.terminate()
    number = signal.SIGINT if whom == "all" else signal.SIGTERM
    assert running.end() == 128 + number, running.said()
    assert running.said().count("stopped and saved after step") == 1
    assert "Traceback" not in running.said()
    assert len(list((project.root / ".rwkvflow").rglob("last.ckpt"))) == 1
    again = project.stage("train").stdout
    assert "continuing after step" in again
    assert bits(project) == project.expected


def test_kills_of_one_process_or_both(project):
    """Whoever is left ends too, and the run continues to the same bytes."""
    draw, kills = random.Random(7), 0
    for victim in ("first", "second", "both", "first"):
        running = Running(project)
        running.wait_for("step ")
        time.sleep(draw.random() * 2 if kills else 0)  # for there to be a kill, however fast the machine is
        others = [one for one in running.others() if "tasks.train" in one.cmdline()]
        for process in {"first": [running.process], "second": others, "both": [*others, running.process]}[victim]:
            process.kill()
        if running.end() == 0:
            break  # it was done before, or its second process was
        kills += 1
    assert kills
    assert kills == 1 or "continuing after step" in running.said()
    project.stage("train")
    assert bits(project) == project.expected


def test_both_go_back_and_leave_out_what_harms(prepared, tmp_path):
    """Lightning has started the second process, and starts no third when the first trains anew."""
    project = copy_of(prepared, tmp_path / "harmed")
    project.set(train__parallel__strategy="ddp", train__parallel__devices=2, train__epochs=None, train__steps=6)
    sides = [Documents(project.root / "outputs/data" / side) for side in ("train", "valid")]
    counts = [np.bincount(np.concatenate([set_of(x) for x in side]), minlength=65536) for side in sides]
    rare = int(np.flatnonzero((counts[0] == 1) & (counts[1] == 0))[0])
    base = project.root / "mine/base.pth"
    tensors = checkpoint.read(base)
    tensors["emb.weight"] = tensors["emb.weight"].clone()
    tensors["emb.weight"][rare] = float("nan")
    checkpoint.write(base, tensors)
    said = project.stage("train").stdout
    assert said.count(": quarantined") == 1, said
    incidents = (project.root / "outputs/train/incidents.jsonl").read_text().splitlines()
    (kept,) = json.loads(incidents[0])["values"]["kept"]
    assert len(list((project.root / ".rwkvflow").rglob(kept))) == 1
    assert project.json("outputs/train/metrics.json")["steps"] == 6


def set_of(document):
    return np.unique(np.asarray(document).astype(np.int64))


def test_torchrun_starts_the_processes(project):
    run = [sys.executable, "-m", "torch.distributed.run"]
    project.run(*run, "--nproc-per-node", "2", "-m", "tasks.train")
    assert bits(project) == project.expected


def test_two_machines_of_one_process(project):
    """As torchrun has them: two agents that meet at an address. It is another run, and its bytes are the same."""
    project.set(train__parallel__devices=1, train__parallel__nodes=2)
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", "29641"]
    nodes = [
        Running(project, ("-m", "torch.distributed.run", *meet, "--node-rank", str(rank), "-m", "tasks.train"))
        for rank in (0, 1)
    ]
    try:
        assert [node.process.wait() for node in nodes] == [0, 0], nodes[0].said() + nodes[1].said()
        found = bits(project)
        assert {name: found[name] for name in OUTPUTS[1:]} == {name: project.expected[name] for name in OUTPUTS[1:]}
    finally:
        project.set(train__parallel__devices=2, train__parallel__nodes=1)


def test_dvc_brings_it_up_to_date(project):
    assert "held-out loss" in project.dvc("repro", "train").stdout
    assert bits(project) == project.expected
