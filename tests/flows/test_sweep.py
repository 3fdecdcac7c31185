"""A sweep as a flow, on a real server; and one of real trainings, which halt and go on."""

import json
import sys

import pytest
from arms import quick
from miniature import processes_in
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
