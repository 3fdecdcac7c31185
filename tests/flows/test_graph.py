"""The graph as DVC has it, and one stage brought up to date."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from miniature import dvc, processes_in, wait_until

from flows import graph
from flows.graph import Outcome, StageError, StoppedError
from rwkv_core.errors import InputError

ALL = ["demo/dvc.yaml:corpus", "prepare", "train", "evaluate"]


def run(*stages: str, **options: object) -> list[Outcome]:
    return [graph.reproduce(stage, lambda _: None, **options) for stage in stages]


def test_the_plan_is_what_dvc_repro_would_run(repository: Path):
    stages = graph.plan()
    assert [stage.name for stage in stages] == ALL
    assert {stage.name: stage.needs for stage in stages}["prepare"] == ("demo/dvc.yaml:corpus",)
    assert stages[2].metrics == (repository / "outputs/metrics.json",)
    assert [stage.name for stage in graph.plan(["prepare"])] == ALL[:2]
    ran = [line for line in dvc("repro", "--force").splitlines() if line.startswith("Running stage")]
    assert ran == [f"Running stage '{name}':" for name in ALL]


def test_a_mistake_is_said_in_three_parts(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"^trian: .*not found.*; .*dvc stage list"):
        graph.plan(["trian"])
    Path("dvc.yaml").write_text("stages: [1")
    with pytest.raises(InputError, match=r"^dvc\.yaml: "):
        graph.plan()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^dvc\.yaml: is not in this folder"):
        graph.plan()


def test_executed_cached_restored(repository: Path):
    assert run(ALL[0], force=True) == [Outcome.EXECUTED]
    assert run("prepare") == [Outcome.CACHED]
    Path("outputs/data.txt").unlink()
    assert run("prepare") == [Outcome.RESTORED]


def test_each_line_is_logged_and_kept(repository: Path):
    lines: list[str] = []
    graph.reproduce(ALL[0], lines.append, force=True)
    assert "corpus: 1 row" in lines
    assert not any("git add" in line for line in lines)
    assert "corpus: 1 row" in Path(".rwkvflow/logs/demo-dvc.yaml-corpus.log").read_text()


def test_the_stage_does_not_see_prefects_context(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT__CONTROL_PORT", "1")
    run("train", environment={"RWKVFLOW_FLOW_RUN": "id"})
    seen = json.loads(Path("stage_environment.json").read_text())
    assert "PREFECT__CONTROL_PORT" not in seen
    assert seen["RWKVFLOW_FLOW_RUN"] == "id"


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/sh"])  # dvc runs a stage in the user's; some report a signal
@pytest.mark.parametrize(
    ("behaviour", "crashed", "reason"),
    [
        ("fail", False, r"^train: data/x\.jsonl: has no rows; add some$"),
        ("crash once", True, r"^train: exited with code 137, SIGKILL, last saying 'step 3 of 10'; .*train\.log$"),
    ],
)
def test_a_failure_says_why_in_the_stages_own_words(
    repository: Path, monkeypatch: pytest.MonkeyPatch, shell: str, behaviour: str, crashed: bool, reason: str
):
    monkeypatch.setenv("SHELL", shell)
    Path("behaviour").write_text(behaviour)
    with pytest.raises(StageError, match=reason) as raised:
        run("train")
    assert raised.value.crashed is crashed


def test_what_dvc_refuses_is_no_crash(repository: Path):
    with pytest.raises(StageError, match=r"^evaluate: .*model\.txt") as raised:
        run("evaluate")
    assert not raised.value.crashed


def start(stop: threading.Event, **options: object) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            graph.reproduce("train", lambda _: None, stop=stop, **options)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, raised


def test_a_stage_that_is_stopped_saves_and_dvc_unlocks(repository: Path):
    Path("behaviour").write_text("slow")
    stop = threading.Event()
    thread, raised = start(stop)
    wait_until(Path("running").exists)
    stop.set()
    thread.join(10)
    assert isinstance(raised[0], StoppedError)
    assert str(raised[0]) == "train: saved at step 7 and stopped"
    assert Path("saved").exists()
    Path("behaviour").write_text("ok")
    dvc("repro")  # would fail on a lock that was left


def test_a_stage_that_saves_longer_than_the_grace_is_left_to_finish(repository: Path):
    Path("behaviour").write_text("slow")
    stop = threading.Event()
    thread, raised = start(stop, grace=0.1)
    wait_until(Path("running").exists)
    stop.set()
    thread.join(10)
    assert "still saving" in str(raised[0])
    wait_until(Path("saved").exists)
    wait_until(lambda: not processes_in(repository))  # dvc, the stage, and the process that watches them


def test_another_dvc_is_waited_for(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph, "_BUSY_WAIT", 0.5)
    Path("behaviour").write_text("slow")
    other = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "train"], stderr=subprocess.DEVNULL)
    wait_until(Path("running").exists)
    lines: list[str] = []
    outcome: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcome.append(graph.reproduce("train", lines.append)))
    thread.start()
    wait_until(lambda: any("waiting" in line for line in lines))
    Path("behaviour").write_text("ok")
    graph.ask_to_stop(other.pid, set(), begun=True)
    assert other.wait(10) != 0
    thread.join(20)
    assert outcome == [Outcome.EXECUTED]


def test_the_shell_around_a_stopped_stage_ends_with_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()
    Path("tasks/__init__.py").touch()
    stage = (
        "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(138))\nopen('begun', 'w')\ntime.sleep(600)\n"
    )
    Path("tasks/stage.py").write_text(stage)
    shell = f"{sys.executable} -m tasks.stage; code=$?; touch ended; while [ ! -e go ]; do sleep 0.1; done; exit $code"
    runs = f"import subprocess, sys; sys.exit(subprocess.call({shell!r}, shell=True))"  # as dvc runs a command
    dvc = subprocess.Popen([sys.executable, "-c", runs])
    wait_until(Path("begun").exists)
    asked = set[int]()
    graph.ask_to_stop(dvc.pid, asked, begun=True)
    wait_until(Path("ended").exists)
    graph.ask_to_stop(dvc.pid, asked, begun=True)
    Path("go").touch()
    assert dvc.wait(30) == 138


def test_what_killed_dvcs_have_left_is_taken_away(repository: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record, here = Path(".dvc/tmp/rwlock"), {"pid": os.getpid(), "cmd": "dvc"}
    dead = {"pid": gone.pid, "cmd": "dvc"}
    record.write_text(json.dumps({"read": {"a": [dead], "b": [dead, here]}, "write": {"c": dead, "d": here}}))
    graph.mend_locks()
    assert json.loads(record.read_text()) == {"read": {"b": [here]}, "write": {"d": here}}
    for half in ("", '{"read": {'):
        record.write_text(half)
        lines: list[str] = []
        assert graph.reproduce("prepare", lines.append) is Outcome.CACHED
        assert "prepare: a dvc was killed while it wrote its locks; they are made anew" in lines


def test_whether_a_stage_is_current_is_what_dvc_would_say(repository: Path):
    assert graph.is_current("prepare")
    assert not graph.is_current("train")
    Path("source.txt").write_text("2")
    assert not graph.is_current("prepare")


@pytest.mark.slow
def test_a_wait_can_be_stopped(repository: Path):
    Path("behaviour").write_text("slow")
    other = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "train"], stderr=subprocess.DEVNULL)
    wait_until(Path("running").exists)
    stop = threading.Event()
    thread, raised = start(stop)
    time.sleep(1)
    stop.set()
    thread.join(10)
    assert "before it had begun" in str(raised[0])
    assert other.poll() is None
    os.kill(other.pid, 9)
    other.wait()
