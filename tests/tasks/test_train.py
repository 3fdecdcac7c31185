"""The training stage: what it keeps, and that a kill at any time changes nothing of it."""

import json
import shutil
import signal
import sys

import pytest
import torch
from project import copy_of, files, make

from rwkv_core import checkpoint
from rwkv_core.adapters import file as adapter_file
from rwkv_core.data.binidx import Documents
from rwkv_core.files import sha256


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    project = make(tmp_path_factory.mktemp("prepared"))
    project.stage("prepare")
    return project


@pytest.fixture
def fresh(prepared, tmp_path):
    """A project whose data is prepared."""
    return copy_of(prepared, tmp_path / "copy")


@pytest.fixture
def tracked(prepared, tmp_path):
    """The same, with an MLflow."""
    return copy_of(prepared, tmp_path / "copy", tracked=True)


KILLED = """
import os, random, signal, sys
from tasks import train
from rwkv_core.models.skeleton import RWKV

left, features = [int(sys.argv[1])], RWKV.features

def counted(self, *arguments, **named):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return features(self, *arguments, **named)

RWKV.features = counted
train.train()
"""


@pytest.mark.slow
def test_a_training_killed_again_and_again_leaves_the_same_files_and_one_curve(tracked):
    """Against a run that nobody killed: adapters, tables and MLflow's curves, in which each step is once, with its value."""
    kept = {"every": 3, "every_epochs": None, "keep_last": 2, "keep_best": 1, "result": "best"}
    tracked.set(train__saves=kept, train__optimizer__lr=0.02, tracking__experiment="undisturbed")
    tracked.stage("train")
    table = (tracked.root / "outputs/train/saves/saves.csv").read_text().splitlines()
    assert table[0] == "file,step,epoch,valid_loss"
    names = {line.partition(",")[0] for line in table[1:]}
    assert {path.name for path in (tracked.root / "outputs/train/saves").iterdir()} == {*names, "saves.csv"}
    assert len(names) >= 2
    expected = {name: data for name, data in files(tracked).items() if name.startswith("outputs/train")}
    shutil.rmtree(tracked.root / "outputs/train")
    shutil.rmtree(tracked.root / ".rwkvflow/runs")

    tracked.set(tracking__experiment="killed")
    for forwards in (5, 5, 6):  # in step 3, while it validates after step 5, in step 8
        killed = tracked.run(sys.executable, "-c", KILLED, str(forwards), check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stdout
    assert "continuing after step" in tracked.stage("train").stdout
    made = {name: data for name, data in files(tracked).items() if name.startswith("outputs/train")}
    differ = {name.rpartition("/")[2] for name in expected if made[name] != expected[name]}
    assert made.keys() == expected.keys()
    assert differ <= {"run.json", "metrics.json", "train_log.txt"}  # which have times in them
    log = [line.split() for line in (tracked.root / "outputs/train/train_log.txt").read_text().splitlines()]
    undisturbed = [line.split() for line in expected["outputs/train/train_log.txt"].decode().splitlines()]
    assert [[*a[:4], *a[6:]] for a in log if len(a) == 8] == [[*b[:4], *b[6:]] for b in undisturbed if len(b) == 8]
    assert next(line[0] for line in log if len(line) != 8) == "NEW"
    curves = json.loads(tracked.run(sys.executable, "-c", CURVES).stdout.splitlines()[-1])
    assert curves["killed"] == curves["undisturbed"]
    steps = tracked.json("outputs/train/metrics.json")["steps"]
    assert [step for step, _ in curves["killed"]["train/loss"]] == list(range(1, steps + 1))


CURVES = """
import json
from mlflow import MlflowClient
client, found = MlflowClient("sqlite:///mlflow.db"), {}
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id]):
        assert experiment.name not in found, "one run, however often it was killed"
        found[experiment.name] = {
            name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in ("train/loss", "train/lr", "train/grad_norm", "train/tokens", "valid/loss")
        }
print(json.dumps(found))
"""


@pytest.mark.slow
def test_kept_adapters_are_merged_by_hand_and_the_best_is_the_result(fresh):
    kept = {"every": None, "every_epochs": 0.5, "keep_last": None, "keep_best": 1, "result": "best"}
    fresh.set(train__saves=kept, train__validate_every=2, train__optimizer__lr=0.9, train__optimizer__lr_final=0.9)
    fresh.set(train__optimizer__schedule="constant")
    for seed in range(10):  # so fast that it gets worse again, by some seeds: by which, a processor's rounding decides
        fresh.set(seed=seed)
        said = fresh.stage("train").stdout
        saves, metrics = fresh.root / "outputs/train/saves", fresh.json("outputs/train/metrics.json")
        if metrics["result_step"] < metrics["steps"]:
            break
    table = [line.split(",") for line in (saves / "saves.csv").read_text().splitlines()[1:]]
    assert [float(line[2]) for line in table if line[1] != str(metrics["result_step"])][-1] == 1.0
    measured = {int(line.split(",")[0]): float(line.split(",")[1])
                for line in (fresh.root / "outputs/train/valid.csv").read_text().splitlines()[2:]}  # fmt: skip
    best = min(measured, key=lambda step: (measured[step], step))
    assert best == metrics["result_step"] < metrics["steps"], "or this test shows nothing"
    assert metrics["valid_loss"] == pytest.approx(measured[best], rel=1e-8)
    assert f"after {best} steps, the best of {metrics['steps']}" in said
    assert (fresh.root / "outputs/train/adapter.pth").read_bytes() == (saves / f"rwkv-{best}.pth").read_bytes()
    last, run = adapter_file.read(saves / f"rwkv-{metrics['steps']}.pth"), adapter_file.read(saves / f"rwkv-{best}.pth")
    assert f"{last[1].run}@{best}" == run[1].run
    assert any(not torch.equal(last[0][name], run[0][name]) for name in last[0])
    merge = (
        sys.executable,
        "-m",
        "flows.cli",
        "merge",
        "mine/base.pth",
        f"outputs/train/saves/rwkv-{best}.pth",
        "by-hand.pth",
    )
    fresh.run(*merge)
    fresh.stage("merge")
    assert sha256(fresh.root / "by-hand.pth") == sha256(fresh.root / "outputs/merged/model.pth")
    assert not list((fresh.root / ".rwkvflow/runs").rglob("*.pth"))
    assert not list((fresh.root / ".rwkvflow/runs").rglob("*.ckpt"))


@pytest.mark.slow
def test_a_run_whose_record_was_lost_goes_on_under_its_id(fresh):
    killed = fresh.run(sys.executable, "-c", KILLED, "7", check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    (record,) = (fresh.root / ".rwkvflow/runs").glob("*/run.json")
    if not (record.parent / "last.ckpt").exists():
        pytest.fail("it was to be killed after a checkpoint")
    known = json.loads(record.read_text())["id"]
    record.unlink()
    assert "continuing after step" in fresh.stage("train").stdout
    assert fresh.json("outputs/train/run.json")["id"] == known


def test_a_logger_that_is_not_installed_is_said_before_anything_is_trained(fresh):
    before = files(fresh)
    fresh.set(tracking__also=["wandb"])
    hidden = "import sys; sys.modules['wandb'] = None; from tasks import stage, train; stage.main(train.train)"
    failed = fresh.run(sys.executable, "-c", hidden, check=False)
    assert failed.returncode == 1
    assert (
        "tracking.also = wandb: it is not installed; pip install 'rwkv-flow[wandb]', or leave it out" in failed.stdout
    )
    assert files(fresh) == before


def planted_project(root):
    """A project whose base has a NaN in the embedding of a token that one training row has."""
    from rwkv_core.tokenizer import named

    project = make(root)
    corpus = project.root / "mine/corpus.jsonl"
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    (token,) = named("world", {}).encode("橋")
    rows[7]["text"] += " 橋 and more."
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = checkpoint.read(project.root / "mine/base.pth")
    base["emb.weight"] = base["emb.weight"].clone()
    base["emb.weight"][token] = float("nan")
    checkpoint.write(project.root / "mine/base.pth", base)
    project.stage("prepare")
    data = Documents(project.root / "outputs/data/train")
    assert any(token in data[i] for i in range(len(data))), "it is held out: plant it in another row"
    return project


@pytest.mark.slow
def test_a_micro_batch_that_does_harm_goes_through_the_pipeline(tmp_path):
    """It is left out, reproduced by a command, in the run's record and in MLflow; samples are kept too."""
    project = planted_project(tmp_path / "project")
    samples = {"every": 4, "prompts": ["User: What is 1?"], "max_tokens": 3, "temperature": 0, "top_p": 1}
    project.set(train__samples=samples, train__guards__attempts=1)
    said = project.stage("train").stdout
    (incident,) = (
        json.loads(line) for line in (project.root / "outputs/train/incidents.jsonl").read_text().splitlines()
    )
    assert (incident["what"], incident["action"]) == ("not_finite", "quarantined")
    assert f"step {incident['step']}: not_finite" in said
    assert project.json("outputs/train/metrics.json")["incidents"] == 1
    assert project.json("outputs/train/run.json")["incidents"] == ["not_finite"]
    (run,) = (project.root / ".rwkvflow/runs").iterdir()
    assert sorted(p.name for p in run.glob("*.jsonl")) == ["metrics.jsonl"]
    folder = run / incident["values"]["kept"][0]
    command = (folder / "README.md").read_text().split("    ")[-1].split()
    done = project.run(sys.executable, *command[1:])
    assert done.stdout.endswith("not finite first: emb\nreproduced\n")
    lines = [json.loads(line) for line in (project.root / "outputs/train/samples.jsonl").read_text().splitlines()]
    steps = project.json("outputs/train/metrics.json")["steps"]
    assert [line["step"] for line in lines] == sorted({*range(0, steps, 4), steps})
    code = (
        "import mlflow, json; c = mlflow.MlflowClient('sqlite:///mlflow.db'); e = c.get_experiment_by_name('rwkv-flow');"
        "(r,) = c.search_runs([e.experiment_id]); print(json.dumps([r.data.tags['incident'],"
        "[a.path for a in c.list_artifacts(r.info.run_id, 'train')]]))"
    )
    tag, artifacts = json.loads(project.run(sys.executable, "-c", code).stdout.splitlines()[-1])
    assert tag == "not_finite"
    assert {"train/incidents.jsonl", "train/samples.jsonl"} <= set(artifacts)


@pytest.mark.slow
def test_more_attempts_continue_a_run_that_was_stopped(tmp_path):
    """attempts is no part of a run's name: what was learned, and what is left out, stays."""
    project = planted_project(tmp_path / "project")
    project.set(train__guards__not_finite="stop")
    failed = project.stage("train", check=False)
    assert failed.returncode == 1
    assert "a loss and its gradient are finite numbers; lower the learning rate" in failed.stdout
    assert "Traceback" not in failed.stdout
    (run,) = (project.root / ".rwkvflow/runs").iterdir()
    record = project.json(run / "run.json")
    assert (record["status"], record["incidents"]) == ("failed", ["not_finite"])
    project.set(train__guards__attempts=5)
    project.stage("train", check=False)
    assert list((project.root / ".rwkvflow/runs").iterdir()) == [run]
