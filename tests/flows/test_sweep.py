"""A sweep as a flow, on a real server; and one of real trainings, which halt and go on."""

import json
import os
import subprocess
import sys
import threading
from uuid import uuid4

import pytest
from arms import quick
from miniature import processes_in, wait_until
from project import make

from flows.arms import Sweep


@pytest.mark.slow
def test_the_flow_shows_each_arm_and_what_came_of_them(prefect_server, tmp_path, monkeypatch):
    from prefect.client.orchestration import get_client

    from flows.sweep import sweep

    project = quick(tmp_path / "served")
    monkeypatch.chdir(project.root)
    state = sweep(Sweep(name="served", grid={"adapter.rank": [2, 13, 4]}, slots=2), return_state=True)
    assert state.is_completed(), state.message
    assert state.message == "3 arms, 1 of them failed; the best has a held-out loss of 0.2700"
    with get_client(sync_client=True) as client:
        tasks = {run.name: run.state_type for run in client.read_task_runs()}
        artifacts = {artifact.key: artifact for artifact in client.read_artifacts()}
    states = {name.partition(" ")[2]: kind.name for name, kind in tasks.items() if name.startswith("served-")}
    assert set(states) == {"to the end"}
    assert sorted(kind.name for name, kind in tasks.items() if name.startswith("served-")) == [
        "COMPLETED", "COMPLETED", "FAILED",
    ]  # fmt: skip
    assert artifacts["sweep-table"].data == (project.root / "sweeps/served/table.md").read_text()
    assert artifacts["sweep-pareto"].data.startswith("![loss against what it takes](data:image/png;base64,")
    assert not processes_in(project.root)


@pytest.fixture
def two_cards(prefect_server, monkeypatch):
    """The server, with a slot for each of two cards."""
    from prefect.client.orchestration import get_client

    from flows import slots

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,9")
    with get_client(sync_client=True) as client:
        slots.create(client)
        yield client
        for name in ("gpu-0", "gpu-1"):
            client.delete_global_concurrency_limit_by_name(name)


@pytest.mark.slow
def test_arms_share_the_cards_with_other_runs(two_cards, tmp_path, monkeypatch):
    from flows import slots
    from flows.life import Life
    from flows.sweep import sweep

    project = quick(tmp_path / "cards", takes=0.5)
    monkeypatch.chdir(project.root)
    other = Life(tmp_path, str(uuid4()), served=False)
    with slots.slot("train", 1, other, threading.Event(), print) as has:
        assert has == {"CUDA_VISIBLE_DEVICES": "7"}
        state = sweep(Sweep(name="cards", grid={"adapter.rank": [2, 3]}, slots=2), return_state=True)
    assert state.is_completed(), state.message
    assert sorted(line.split()[::2] for line in (project.root / "ran").read_text().splitlines()) == [
        ["2", "9"],
        ["3", "9"],
    ]
    assert set((project.root / "together").read_text().split()) == {"1"}
    assert not any(limit.active_slots for limit in two_cards.read_global_concurrency_limits(limit=20))


@pytest.mark.slow
def test_of_a_sweep_that_is_killed_nothing_goes_on(two_cards, tmp_path, monkeypatch):
    """Its arms save and end, and Prefect is told."""
    from flows.reconcile import reconcile

    project = quick(tmp_path / "killed", takes=600)
    monkeypatch.chdir(project.root)
    (project.root / "sweep.json").write_text(
        json.dumps({"name": "killed", "grid": {"adapter.rank": [2, 3]}, "slots": 2})
    )
    command = [sys.executable, "-m", "flows.cli", "sweep", "sweep.json"]
    told = project.environment | {name: os.environ[name] for name in ("PREFECT_API_URL", "CUDA_VISIBLE_DEVICES")}
    process = subprocess.Popen(command, env=told, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    going = project.root / "going"
    wait_until(lambda: going.exists() and len(list(going.iterdir())) == 2, 120)
    process.kill()
    process.wait()
    wait_until(lambda: not processes_in(project.root), 60)
    assert sum(limit.active_slots for limit in two_cards.read_global_concurrency_limits(limit=20)) == 2
    assert reconcile(two_cards, project.root) == 1
    assert not any(limit.active_slots for limit in two_cards.read_global_concurrency_limits(limit=20))
    (run,) = [run for run in two_cards.read_flow_runs() if run.state.is_crashed()]
    assert "start it again" in run.state.message


@pytest.mark.slow
def test_halving_has_no_seam_and_mlflow_nests_the_arms(tmp_path):
    project = make(tmp_path / "halving")
    own = {"train.epochs": None, "train.steps": 12, "train.validate_every": 4}
    halving = {"first": 4, "unit": "steps", "factor": 2}
    content = {
        "name": "rates",
        "grid": {"train.optimizer.lr": [0.01, 0.002]},
        "fixed": own,
        "halving": halving,
        "slots": 2,
    }
    (project.root / "sweep.json").write_text(json.dumps(content))
    printed = project.run(sys.executable, "-m", "flows.cli", "sweep", "sweep.json").stdout
    assert printed.count("after 4 steps") == 2
    assert printed.count("after 12 steps") == 1
    arms = [json.loads(path.read_text()) for path in project.root.glob(".rwkvflow/sweeps/rates/arms/*.json")]
    best, other = sorted(arms, key=lambda arm: len(arm["rungs"]), reverse=True)
    assert [list(best["rungs"]), list(other["rungs"])] == [["4", "end"], ["4"]]
    assert best["rungs"]["4"]["loss"] < other["rungs"]["4"]["loss"]
    assert best["rungs"]["end"]["run"] == best["rungs"]["4"]["run"]
    assert best["rungs"]["end"]["seconds"] >= best["rungs"]["4"]["seconds"]

    revision = best["rungs"]["end"]["revision"]
    plain = make(tmp_path / "plain")
    rate = best["values"]["train.optimizer.lr"]
    plain.set(train__epochs=None, train__steps=12, train__validate_every=4, train__optimizer__lr=rate)
    plain.dvc("repro", "train")
    for file in ("adapter.pth", "history.csv", "valid.csv"):
        project.dvc("get", ".", f"outputs/train/{file}", "--rev", revision, "-o", f".rwkvflow/{file}")
        assert (project.root / ".rwkvflow" / file).read_bytes() == (plain.root / "outputs/train" / file).read_bytes(), (
            file
        )

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project.root / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("rwkv-flow").experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "rates"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 3
    assert {run.data.tags["rwkvflow.run"] for run in children} == {arm["rungs"]["4"]["run"] for arm in arms}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.data.metrics["sweep/arms"] == 2
    assert {entry.path for entry in client.list_artifacts(parent.info.run_id)} == {"table.md", "pareto.png"}
    assert not processes_in(project.root)
