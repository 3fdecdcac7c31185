"""DVC past one checkout: remotes, a base from the web, the queue, plots, and what gc takes. Real servers, real stages."""

import contextlib
import csv
import getpass
import json
import re
import shutil
import sys
from pathlib import Path

import psutil
import pytest
import servers
from miniature import processes_in, wait_until
from project import Project, make, write_base
from ruamel.yaml import YAML

pytestmark = pytest.mark.slow

KEY, SECRET = "team-key", "s3-secret-of-the-team"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose base came from the web and whose corpus was added to DVC; its pipeline has run."""
    project = make(tmp_path_factory.mktemp("remotes") / "project")
    (project.root / "corpus").mkdir()
    with servers.web(project.root / "mine") as url:
        project.dvc("import-url", f"{url}/base.pth", "models/base.pth")
    (project.root / "mine/corpus.jsonl").rename(project.root / "corpus/mine.jsonl")
    project.dvc("add", "corpus/mine.jsonl")
    project.set(model__base="models/base.pth", data__source="corpus/mine.jsonl")
    project.dvc("repro")
    commit(project, "ran")
    return project


@pytest.fixture(scope="module")
def queued(project):
    """The same, after two experiments that two workers of the queue ran."""
    for name, rank in (("narrow", 1), ("wide", 4)):
        project.dvc("exp", "run", "--queue", "-n", name, "-S", f"adapter.rank={rank}")
    project.dvc("queue", "start", "-j", "2")
    project.queue = ""

    def over():
        project.queue = project.dvc("queue", "status").stdout
        return not re.search(r"Queued|Running", project.queue)

    try:
        wait_until(over, 1800)
    finally:
        project.dvc("queue", "stop", "--kill")
        for process in processes_in(project.root):  # workers end by themselves, but later
            with contextlib.suppress(psutil.Error):
                process.kill()
    return project


def commit(project, message):
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", message)


def clone(project, root):
    project.run("git", "clone", "-q", str(project.root), str(root))
    return Project(root, project.environment)


def objects(store):
    """What lies in a cache or a remote."""
    return {path.parent.name + path.name.removesuffix(".dir") for path in store.glob("files/md5/*/*")}


def used(project, name):
    """What the outputs of a branch or an experiment are, as its dvc.lock has them."""
    experiment = project.run("git", "for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").stdout.strip()
    lock = YAML(typ="safe").load(project.run("git", "show", f"{experiment or name}:dvc.lock").stdout)
    return {out["md5"].removesuffix(".dir") for stage in lock["stages"].values() for out in stage["outs"]}


@contextlib.contextmanager
def remote(kind, folder):
    """A remote: the words of `dvc remote` that are committed, and those that each person adds, who has the passwords."""
    own = []
    with contextlib.ExitStack() as stack:
        if kind == "folder":
            common = [["add", "-d", "team", str(folder / "store")]]
        elif kind == "s3":
            url = stack.enter_context(servers.s3(folder, "team"))
            common = [["add", "-d", "team", "s3://team/dvc"], ["modify", "team", "endpointurl", url]]
            for name, value in (("access_key_id", KEY), ("secret_access_key", SECRET)):
                own.append(["modify", "--local", "team", name, value])
        else:
            port, key = stack.enter_context(servers.ssh(folder))
            common = [["add", "-d", "team", f"ssh://{getpass.getuser()}@127.0.0.1:{port}{folder}/store"]]
            own.append(["modify", "--local", "team", "keyfile", str(key)])
        yield common, own


@pytest.mark.parametrize("kind", ["folder", "s3", "ssh"])
def test_a_colleague_has_the_result_without_training(kind, project, tmp_path):
    before = project.run("git", "rev-parse", "HEAD").stdout.strip()
    with remote(kind, tmp_path) as (common, own):
        for words in common + own:
            project.dvc("remote", *words)
        commit(project, f"a remote: {kind}")
        try:
            assert "pushed" in project.dvc("push").stdout
            colleague = clone(project, tmp_path / "colleague")
            assert SECRET not in project.run("git", "show").stdout
        finally:
            project.run("git", "reset", "-q", "--hard", before)
            (project.root / ".dvc/config.local").unlink(missing_ok=True)
        for words in own:
            colleague.dvc("remote", *words)
        colleague.dvc("pull", "--with-deps", "dvc.yaml")
    for name in ("models/base.pth", "corpus/mine.jsonl", "outputs/train/adapter.pth", "outputs/export/model.st"):
        assert (colleague.root / name).read_bytes() == (project.root / name).read_bytes()
    assert "up to date" in colleague.dvc("status", "dvc.yaml").stdout
    assert "Running stage" not in colleague.dvc("repro").stdout
    if kind == "folder":
        its_run_is_rebuilt(colleague, tmp_path)


def its_run_is_rebuilt(colleague, folder):
    """In MLflow, from nothing but the outputs."""
    colleague.run(sys.executable, "-m", "flows.cli", "sync")
    client, (run,) = tracked(colleague)
    assert run.data.tags["rwkvflow.run"] == colleague.json("outputs/train/run.json")["id"]
    assert run.info.status == "FINISHED"
    losses = [float(row["loss"]) for row in table(colleague, "train/valid.csv")]
    assert [point.value for point in client.get_metric_history(run.info.run_id, "valid/loss")] == losses
    stored = Path(client.download_artifacts(run.info.run_id, "train/adapter.pth", str(folder)))
    assert stored.read_bytes() == (colleague.root / "outputs/train/adapter.pth").read_bytes()


def tracked(project):
    """A client of the project's MLflow, and the runs there."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project.root}/mlflow.db")
    experiments = [found.experiment_id for found in client.search_experiments()]
    return client, list(client.search_runs(experiments))


def table(project, name):
    with (project.root / "outputs" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_changed_base_at_its_address_is_noticed(project, tmp_path):
    colleague = clone(project, tmp_path / "colleague")
    served = tmp_path / "served"
    write_base(served / "base.pth", seed=1)
    with servers.web(served) as url:
        imported = colleague.root / "models/base.pth.dvc"
        imported.write_text(re.sub(r"http://[\d.:]+", url, imported.read_text()))
        colleague.dvc("update", "models/base.pth.dvc")
    assert (colleague.root / "models/base.pth").read_bytes() == (served / "base.pth").read_bytes()
    status = json.loads(colleague.dvc("status", "--json", "train").stdout)
    assert any("models/base.pth" in changed.get("changed deps", {}) for changed in status["train"])


def test_the_queue_runs_in_copies_and_records_in_one_place(queued):
    assert queued.queue.count("Success") == 2
    runs = {run.data.params["adapter.rank"]: run for run in tracked(queued)[1]}
    assert set(runs) == {"1", "2", "4"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    names = {rank: run.data.tags.get("dvc.experiment") for rank, run in runs.items()}
    assert (names["1"], names["4"]) == ("narrow", "wide")
    assert queued.run("git", "status", "--porcelain").stdout == ""  # the working copy is as it was
    assert not list((queued.root / ".dvc/tmp/exps").glob("tmp*"))


def test_the_plots_show_experiments_over_each_other(queued, tmp_path):
    import vl_convert

    found = json.loads(queued.dvc("plots", "diff", "--json", "workspace", "narrow", "wide").stdout)
    assert not found.get("errors")
    drawn = {}
    for name, (plot,) in found["data"].items():
        spec = plot["content"] if isinstance(plot["content"], dict) else json.loads(plot["content"])
        drawn[name] = vl_convert.vegalite_to_svg(spec, vl_version="5.20")
        (tmp_path / f"{name}.svg").write_text(drawn[name])
    titles = {
        "loss": "Loss", "documents": "Held-out documents", "positions": "Loss by position", "measures": "Measures",
        "lengths": "Documents by length",
    }  # fmt: skip
    assert set(drawn) == set(titles)
    for name, title in titles.items():
        assert f">{title}<" in drawn[name]
        for experiment in ("workspace", "narrow", "wide"):
            assert f">{experiment}<" in drawn[name]
    held_out, documents = len(table(queued, "train/valid.csv")), len(table(queued, "evaluate/documents.csv"))
    assert drawn["loss"].count('aria-roledescription="line mark"') == 3 * 3  # each step, their mean, held out
    assert drawn["loss"].count('aria-roledescription="point"') == 3 * held_out
    assert drawn["documents"].count('aria-roledescription="circle"') == 3 * documents
    assert drawn["documents"].count('aria-roledescription="line mark"') == 1  # the diagonal
    assert drawn["measures"].count('aria-roledescription="point"') == 3 * (
        len(table(queued, "evaluate/measures.csv")) - 1
    )  # less perplexity
    assert drawn["lengths"].count('aria-roledescription="bar"') == 3 * len(table(queued, "data/lengths.csv"))


def test_an_experiment_is_shared_and_what_is_removed_everywhere_leaves_the_remote(queued, tmp_path):
    store = tmp_path / "store"
    queued.run("git", "init", "-q", "--bare", "-b", "main", str(tmp_path / "origin"))
    queued.run("git", "remote", "add", "origin", str(tmp_path / "origin"))
    queued.run("git", "push", "-q", "origin", "main")
    queued.dvc("remote", "add", "--local", "-d", "team", str(store))
    queued.dvc("push", "dvc.yaml", "models/base.pth.dvc", "corpus/mine.jsonl.dvc")
    queued.dvc("exp", "push", "origin", "narrow", "wide")
    kept = used(queued, "HEAD") | used(queued, "wide")
    gone = used(queued, "narrow") - kept
    assert gone | kept <= objects(store)

    queued.run("git", "clone", "-q", str(tmp_path / "origin"), str(tmp_path / "colleague"))
    colleague = Project(tmp_path / "colleague", queued.environment)
    colleague.dvc("remote", "add", "--local", "-d", "team", str(store))
    colleague.dvc("exp", "pull", "origin", "wide")
    colleague.dvc("exp", "apply", "wide", check=False)  # as below: nobody has run the demo
    assert "up to date" in colleague.dvc("status", "dvc.yaml").stdout
    assert "Running stage" not in colleague.dvc("repro").stdout
    assert json.loads(colleague.dvc("params", "diff", "--json").stdout)["params.yaml"]["adapter.rank"]["new"] == 4

    clear = ["gc", "--all-branches", "--all-tags", "--all-experiments", "--cloud"]
    asked = colleague.dvc(*clear, "--dry").stdout
    assert all(f"{name[:2]}/{name[2:]}" in asked for name in gone)  # others' experiments, unless they are here
    colleague.dvc("exp", "pull", "-A", "--no-cache", "origin")
    assert "Removing" not in colleague.dvc(*clear, "--dry").stdout
    colleague.dvc("exp", "remove", "narrow")
    colleague.dvc("exp", "remove", "--git-remote", "origin", "narrow")
    colleague.dvc(*clear, "--force")
    assert kept <= objects(store)
    assert not gone & objects(store)
    assert "narrow" not in colleague.dvc("exp", "list", "origin").stdout


def test_gc_takes_what_no_revision_uses_and_nothing_else(queued):
    kept = used(queued, "HEAD") | used(queued, "wide")
    gone = used(queued, "narrow") - kept
    queued.dvc("exp", "run", "--queue", "-n", "later", "-S", "adapter.rank=3")
    queued.dvc("exp", "remove", "narrow")
    assert gone <= objects(queued.root / ".dvc/cache")
    queued.dvc("gc", "--all-branches", "--all-tags", "--all-experiments", "--force")
    assert kept <= objects(queued.root / ".dvc/cache")
    assert not gone & objects(queued.root / ".dvc/cache")
    shutil.rmtree(queued.root / "outputs")
    queued.dvc("exp", "apply", "wide", check=False)  # it misses what the demo's stages, never run here, would have made
    assert "up to date" in queued.dvc("status", "dvc.yaml").stdout
    assert "Running stage" not in queued.dvc("repro").stdout
    for name in ("models/base.pth", "corpus/mine.jsonl"):
        assert (queued.root / name).exists()
        (queued.root / name).unlink()
    queued.dvc("checkout", "models/base.pth.dvc", "corpus/mine.jsonl.dvc")
    assert "later" in queued.dvc("queue", "status").stdout
