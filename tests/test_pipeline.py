"""The pipeline whole, as DVC runs it, without any server."""

import csv
import json
import re
import sys

import pytest
import random_models
from project import NOWHERE, ROOT, make, write_base, write_corpus
from safetensors.torch import save_file

from rwkv_core import checkpoint
from rwkv_core.formats import web_rwkv

STAGES = ["prepare", "preview", "train", "merge", "evaluate", "export"]


def ran(output):
    return re.findall(r"Running stage '(?:dvc.yaml:)?([^']+)'", output)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose pipeline has run once; its lock is committed."""
    project = make(tmp_path_factory.mktemp("pipeline"))
    project.first = project.dvc("repro").stdout
    project.environment |= NOWHERE
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "ran")
    return project


@pytest.fixture(autouse=True)
def _as_committed(project):
    """Each test begins with everything up to date. Outputs are others where the lock is, and then alone."""
    yield
    ran = project.run("git", "diff", "--quiet", "dvc.lock", check=False).returncode
    project.run("git", "checkout", "-q", ".")
    if ran:
        project.dvc("checkout", "-q", "--allow-missing")


def test_everything_runs_in_order_after_a_clone(project):
    assert ran(project.first) == STAGES


def test_nothing_is_left_to_do_the_second_time(project):
    assert ran(project.dvc("repro").stdout) == []
    assert "up to date" in project.dvc("status", "dvc.yaml").stdout


@pytest.mark.slow
def test_another_rank_trains_again_and_prepares_nothing(project):
    project.set(adapter__rank=3)
    assert ran(project.dvc("repro").stdout) == ["train", "merge", "evaluate", "export"]
    changes = project.dvc("metrics", "diff").stdout
    assert "outputs/evaluate/metrics.json" in changes
    assert "tuned.loss" in changes


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("rwkv_core/export.py", {"export"}),
        ("rwkv_core/data/sampling.py", {"train"}),
        ("rwkv_core/report.html.j2", {"evaluate"}),
        ("rwkv_core/merge.py", {"merge"}),
        ("rwkv_core/generation/text.py", {"train", "evaluate"}),
        ("kernels/wkv7.py", {"train", "evaluate", "export"}),
        ("rwkv_core/files.py", set(STAGES)),
        ("README.md", set()),
        ("flows/pipeline.py", set()),
    ],
)
def test_a_changed_file_makes_the_stages_that_use_it_stale(project, file, stale):
    path = project.root / file
    path.write_text(path.read_text() + "\n")
    status = json.loads(project.dvc("status", "--json").stdout)
    assert {name for name in status if "demo" not in name} == stale


@pytest.mark.slow
def test_an_adapter_to_go_on_from_is_a_dependency(project):
    adapter = project.root / "start/mine.pth"
    adapter.write_bytes((project.root / "outputs/train/adapter.pth").read_bytes())
    project.set(adapter__load="start/mine.pth")
    project.dvc("repro", "train")
    adapter.write_bytes(adapter.read_bytes() + b" ")  # the same name
    status = json.loads(project.dvc("status", "train", "--json").stdout)
    adapter.unlink()
    assert {"changed deps": {"start": "modified"}} in status["train"]


def test_a_setting_that_no_stage_depends_on_changes_nothing(project):
    project.set(tracking__experiment="another")
    assert ran(project.dvc("repro").stdout) == []


@pytest.mark.slow
def test_a_failed_stage_keeps_what_was_there(project):
    before = (project.root / "outputs/train/adapter.pth").read_bytes()
    project.set(train__optimizer__warmup_steps=10_000)
    failed = project.dvc("repro", check=False)
    assert failed.returncode != 0
    assert "warmup_steps = 10000" in failed.stdout
    assert (project.root / "outputs/train/adapter.pth").read_bytes() == before


@pytest.mark.slow
def test_experiments_are_run_and_compared(project):
    assert ran(project.dvc("exp", "run", "-n", "wider", "-S", "adapter.rank=4").stdout) == STAGES[2:]
    table = project.dvc("exp", "show", "--csv").stdout
    header, *rows = csv.reader(table.splitlines())
    assert any("wider" in row for row in rows)
    assert any("adapter.rank" in name for name in header)
    assert any("tuned.loss" in name for name in header)
    ranks = {row[next(i for i, name in enumerate(header) if "adapter.rank" in name)] for row in rows}
    assert {"2", "4"} <= ranks


def test_the_curves_can_be_drawn(project):
    project.dvc("plots", "show", "--out", "page")
    page = (project.root / "page" / "index.html").read_text()
    for title in ("Loss", "Held-out documents", "Loss by position", "Measures", "Documents by length"):
        assert title in page


def test_a_remote_brings_everything_back(project, tmp_path):
    project.dvc("remote", "add", "-f", "-d", "store", str(tmp_path / "store"))
    project.dvc("push")
    other = tmp_path / "elsewhere"
    project.run("git", "clone", "-q", str(project.root), str(other))
    for name in ("base.pth", "corpus.jsonl"):
        (other / "mine").mkdir(exist_ok=True)
        (other / "mine" / name).write_bytes((project.root / "mine" / name).read_bytes())
    elsewhere = type(project)(other, project.environment)
    elsewhere.dvc("remote", "add", "-f", "-d", "store", str(tmp_path / "store"))
    elsewhere.dvc("pull", "dvc.yaml")
    for file in ("outputs/train/adapter.pth", "outputs/export/model.st", "outputs/evaluate/report.html"):
        assert (other / file).read_bytes() == (project.root / file).read_bytes()
    assert ran(elsewhere.dvc("repro").stdout) == []


def test_own_inputs_leave_the_demo_out(project):
    assert "demo" not in project.first
    write_base(project.root / "mine" / "another.pth", seed=3)
    write_corpus(project.root / "mine" / "another.jsonl", seed=3)
    project.set(model__base="mine/another.pth", data__source="mine/another.jsonl")
    assert ran(project.dvc("repro", "--dry").stdout)[0] == "prepare"
    assert "demo" not in project.dvc("repro", "--dry").stdout


def test_as_cloned_the_demo_comes_first(tmp_path):
    cloned = make(tmp_path / "clone")
    (cloned.root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    asked = "from flows.graph import plan; print(*[stage.name for stage in plan()])"
    planned = cloned.run(sys.executable, "-c", asked).stdout.split()
    assert {"demo/dvc.yaml:corpus", "demo/dvc.yaml:pretrain"} < set(planned)
    assert [name for name in planned if "demo" not in name] == STAGES
    assert planned.index("demo/dvc.yaml:corpus") < planned.index("prepare")
    assert planned.index("demo/dvc.yaml:pretrain") < planned.index("train")


@pytest.mark.slow
def test_a_tuned_state_comes_and_goes_with_its_model(project):
    """The folder of the merged model is one output: what is in it depends on the method."""
    state = {"kind": "state", "state": "wkv", "layers": "all", "also": [], "load": None}
    project.set(adapter=state, train__rows="pad", train__optimizer__lr=0.1)
    assert ran(project.dvc("repro").stdout) == ["preview", "train", "merge", "evaluate", "export"]
    assert ran(project.dvc("repro").stdout) == []
    made = [project.root / f"outputs/{name}" for name in ("merged/state.pth", "export/state.pth", "export/model.state")]
    assert all(path.exists() for path in made)
    project.run("git", "checkout", "-q", ".")
    project.dvc("checkout", "-q", "--allow-missing")
    assert not any(path.exists() for path in made)
    assert ran(project.dvc("repro").stdout) == []


@pytest.mark.slow
@pytest.mark.parametrize(("version", "form"), [("4", ".pth"), ("5.2", ".st"), ("6", ".safetensors")])
def test_older_versions_and_other_forms_go_through(project, version, form):
    """From the base to a judged and exported model, with nothing set but the path."""
    model = random_models.make(version=version, n_layer=2, n_embd=32, head_size=16, vocab_size=65536)
    base = project.root / "mine" / f"older{form}"
    tensors = {name: x.detach().half() for name, x in model.state_dict().items()}
    if form == ".pth":
        checkpoint.write(base, tensors)
    elif form == ".st":
        web_rwkv.write(base, tensors)
    else:
        save_file(tensors, base)
    project.set(model__base=f"mine/older{form}")
    assert ran(project.dvc("repro").stdout) == STAGES[2:]
    assert project.json("outputs/train/run.json")["base"]["version"] == version
    metrics = project.json("outputs/evaluate/metrics.json")
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"]
    exported = checkpoint.read(project.root / "outputs/export/model.pth")
    assert [(n, x.shape) for n, x in exported.items()] == [(n, x.shape) for n, x in model.state_dict().items()]
