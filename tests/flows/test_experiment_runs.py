"""Runs that a form starts, retraining, and judging alone: a real server, real DVC, real git, real processes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from miniature import dvc
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def project(prefect_server: str, repository: Path) -> Path:
    """The miniature, with a params.yaml like the real one, on which its training depends, all of it brought up to date."""
    yaml = YAML()
    params = yaml.load((ROOT / "params.yaml").read_text())
    params["data"]["source"] = "source.txt"
    with Path("params.yaml").open("w") as sink:
        yaml.dump(params, sink)
    graph = Path("dvc.yaml").read_text().replace("{cache: false}", "{persist: true}")
    graph = graph.replace("deps: [outputs/data.txt]", "deps: [outputs/data.txt]\n    params: [train]")
    Path("dvc.yaml").write_text(graph)
    Path("demo/dvc.yaml").write_text(Path("demo/dvc.yaml").read_text().partition("  unused:")[0])
    prepare = Path("tasks/prepare.py").read_text()
    Path("tasks/prepare.py").write_text(prepare.replace("demo/outputs/corpus.txt", "source.txt"))
    Path(".gitignore").write_text(Path(".gitignore").read_text().replace("/behaviour\n", ""))
    code = Path("tasks/train.py").read_text()
    Path("tasks/train.py").write_text(code.replace('+ "train\\n"', '+ Path("params.yaml").read_text()'))
    git("add", "-A")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "params")
    dvc("repro", "-q")
    git("add", "-A")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "trained")
    Path("tries").unlink()
    return repository


def everything(root: Path) -> dict[str, bytes]:
    """All files of the working copy but those of git, DVC and Prefect."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not {".git", ".dvc", ".rwkvflow", "__pycache__"} & {*path.relative_to(root).parts}
    }


def pipeline(**parameters: Any) -> Any:
    from flows.pipeline import pipeline

    return pipeline(**parameters, return_state=True)


def retrain(**parameters: Any) -> Any:
    from flows.retrain import retrain

    return retrain(**parameters, return_state=True)


def evaluate_only(**parameters: Any) -> Any:
    from flows.pipeline import evaluate_only

    return evaluate_only(**parameters, return_state=True)


def report(state: Any) -> str:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    this = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        return "\n".join(str(artifact.data) for artifact in client.read_artifacts(artifact_filter=this))


def test_settings_become_an_experiment_and_the_working_copy_stays(project: Path):
    Path("notes.md").write_text("not finished")  # what a person is at
    before, head = everything(project), git("rev-parse", "HEAD")
    state = pipeline(settings={"train.epochs": 7, "adapter": {"kind": "bone", "rank": 4}, "train.ctx_len": 256})
    assert state.is_completed(), state.message
    assert everything(project) == before
    assert git("rev-parse", "HEAD") == head
    assert git("worktree", "list").count("\n") == 0
    name = state.message.rpartition(" ")[2]
    assert "2 executed, 2 up to date" in state.message
    assert f"DVC experiment: `{name}`" in report(state)
    assert "| loss.valid | 2.12346 |" in report(state)
    shown = json.loads(dvc("exp", "show", "--json"))
    (experiment,) = (e for base in shown for e in base["experiments"] or [])
    assert experiment["name"] == name
    assert experiment["revs"][0]["data"]["params"]["params.yaml"]["data"]["train"]["epochs"] == 7

    dvc("exp", "apply", name)
    params = YAML(typ="safe").load(Path("params.yaml").read_text())
    assert (params["train"]["epochs"], params["adapter"]["kind"], params["adapter"]["rank"]) == (7, "bone", 4)
    assert "epochs: 7" in Path("outputs/model.txt").read_text()
    assert "up to date" in dvc("repro")


def test_the_values_of_params_yaml_are_no_experiment(project: Path):
    state = pipeline(settings={"train.ctx_len": 256, "more": []})
    assert state.message == "4 stages: 0 executed, 4 up to date, 0 restored from the run cache"
    assert not dvc("exp", "list").strip()


@pytest.mark.parametrize(
    ("otherwise", "reason"),
    [
        ({"data.source": "../secret.jsonl"}, "data.source = ../secret.jsonl: must be inside the project"),
        ({"train.ctx_len": 1}, "train.ctx_len = 1: should be greater than or equal to 2"),
        ({"train.lr": 1}, "train.lr: there is no such setting"),
    ],
)
def test_a_wrong_setting_fails_the_run_with_the_reason(project: Path, otherwise: dict[str, Any], reason: str):
    before = everything(project)
    state = pipeline(settings=otherwise)
    assert state.is_failed()
    assert reason in state.message
    assert everything(project) == before
    assert git("worktree", "list").count("\n") == 0


def test_a_stage_that_fails_in_an_experiment_saves_none(project: Path):
    Path("behaviour").write_text("fail")
    state = pipeline(settings={"train.epochs": 7})
    assert state.message == "stage train failed: data/x.jsonl: has no rows; add some"
    assert not dvc("exp", "list").strip()


def test_retraining_waits_for_new_data(project: Path):
    first = retrain()
    assert first.is_completed()
    assert "4 stages: 0 executed" in first.message
    again = retrain()
    assert (again.name, again.is_completed()) == ("Nothing new", True)
    assert "source.txt holds what it did" in again.message
    assert "4 stages" in retrain(always=True).message

    Path("source.txt").write_text("2")
    Path("behaviour").write_text("fail")
    assert retrain().is_failed()
    Path("behaviour").write_text("ok")
    new = retrain()  # for the last one that succeeded had seen the old
    assert new.is_completed()
    assert "train: done" in Path(".rwkvflow/logs/train.log").read_text()
    assert "4 stages" in new.message
    assert retrain().name == "Nothing new"


def test_retraining_fetches_what_an_import_is_from(project: Path, tmp_path: Path):
    there = tmp_path / "there.txt"
    there.write_text("of yesterday")
    Path("source.txt").unlink()
    git("rm", "-q", "--cached", "source.txt")
    dvc("import-url", "-q", str(there), "source.txt")
    assert "executed" in retrain().message
    there.write_text("of today")
    assert retrain(fetch=False).name == "Nothing new"
    assert "5 stages: 3 executed" in retrain().message
    assert Path("source.txt").read_text() == "of today"

    there.unlink()
    gone = retrain()
    assert gone.is_failed()
    assert "dvc update source.txt.dvc: did not succeed" in gone.message


def test_retraining_pulls_what_was_added_elsewhere(project: Path, tmp_path: Path):
    git("rm", "-q", "--cached", "source.txt")
    dvc("add", "-q", "source.txt")
    assert retrain().is_completed()  # no remote yet
    dvc("remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    dvc("push", "-q", "source.txt.dvc")
    pointer = Path("source.txt.dvc").read_text()
    Path("source.txt").write_text("of a colleague")
    dvc("add", "-q", "source.txt")
    dvc("push", "-q", "source.txt.dvc")
    theirs = Path("source.txt.dvc").read_text()
    Path("source.txt.dvc").write_text(pointer)
    dvc("checkout", "-q", "source.txt.dvc")
    assert retrain().name == "Nothing new"
    Path("source.txt.dvc").write_text(theirs)  # as git pull does
    assert "5 stages: 3 executed" in retrain().message
    assert Path("source.txt").read_text() == "of a colleague"


def test_judging_alone_never_trains(project: Path):
    Path("outputs/model.txt").unlink()  # DVC has it
    assert evaluate_only().message == "4 stages: 0 executed, 4 up to date, 0 restored from the run cache"
    assert Path("outputs/model.txt").exists()
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("epochs: 2\n", "epochs: 3\n"))
    state = evaluate_only()
    assert state.is_failed()
    assert "would have to be trained first" in state.message
    assert "train: params.yaml train modified" in state.message
    assert not Path("tries").exists()


def test_judging_by_other_settings_is_an_experiment(project: Path):
    before = everything(project)
    state = evaluate_only(settings={"evaluate.batch": 3})
    assert "kept as DVC experiment" in state.message
    assert everything(project) == before
    assert not Path("tries").exists()
