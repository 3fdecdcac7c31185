"""Runs with other parameters, in checkouts of their own, kept as DVC experiments."""

import json
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from project import Project, make
from ruamel.yaml import YAML

from flows import experiment, graph
from rwkv_core.errors import InputError, WorldError

SHORT = {"train.epochs": None, "train.steps": 4}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Project:
    """A project whose data is prepared; its lock is not committed. Its path has a space and an @."""
    project = make(tmp_path_factory.mktemp("experiment") / "a place@home")
    project.dvc("repro", "prepare")
    return project


@pytest.fixture
def project(prepared, monkeypatch) -> Project:
    """In its environment, but not in its folder."""
    for name, value in prepared.environment.items():
        monkeypatch.setenv(name, value)
    return prepared


def working_copy(project: Project) -> dict[str, bytes | str]:
    """Every byte of it, git's index and the cache's settings included; what runs write beside it is not."""
    beside = (".rwkvflow", "mlflow.db", "mlartifacts", ".dvc/cache", ".dvc/tmp", ".git")
    found = {
        ".git/index": (project.root / ".git/index").read_bytes(),
        "status": project.run("git", "status", GIT_OPTIONAL_LOCKS="0").stdout,
    }
    for path in project.root.rglob("*"):
        name = path.relative_to(project.root).as_posix()
        if path.is_file() and not name.startswith(beside) and "__pycache__" not in name:
            found[name] = path.read_bytes()
    return found


def experiments(project: Project) -> dict[str, dict]:
    """As `dvc exp show` has them, by name."""
    shown = json.loads(project.dvc("exp", "show", "--json").stdout.partition("[")[2].join(("[", "")))
    return {
        revision["name"]: revision["data"]
        for base in shown
        for entry in base.get("experiments") or ()
        for revision in entry["revs"]
    }


def params(folder: Path) -> dict:
    return YAML(typ="safe").load((folder / "params.yaml").read_text())


@pytest.mark.slow
def test_an_experiment_trains_is_listed_and_leaves_the_working_copy(project):
    project.set(train__optimizer__lr=0.008)  # not committed: it takes part
    before = working_copy(project)
    with experiment.checkout(project.root, "first", SHORT | {"adapter.rank": 3}) as folder:
        assert [s.name for s in graph.plan(["train"], folder)] == ["prepare", "train"]
        lines: list[str] = []
        tell = experiment.environment(folder, "first")
        graph.reproduce("train", lines.append, root=folder, needs=True, environment=tell)
        assert "Stage 'prepare' didn't change, skipping" in lines
        record = json.loads((folder / "outputs/train/run.json").read_text())
        revision = experiment.save(folder, "first")
    assert not folder.exists()
    assert working_copy(project) == before
    head = project.run("git", "rev-parse", "HEAD").stdout.strip()
    assert record["dvc_experiment"] == {"name": "first", "baseline": head}
    assert (project.root / f".rwkvflow/runs/{record['digest']}").is_dir()
    listed = experiments(project)["first"]
    assert listed["rev"] == revision
    assert listed["params"]["params.yaml"]["data"]["adapter"]["rank"] == 3
    assert listed["params"]["params.yaml"]["data"]["train"]["optimizer"]["lr"] == 0.008
    assert listed["metrics"]["outputs/train/metrics.json"]["data"]["steps"] == 4
    changed = project.run("git", "diff", "--name-only", "HEAD", revision).stdout.split()
    assert changed == ["dvc.lock", "params.yaml"]
    project.run("git", "checkout", "-q", "HEAD", "params.yaml")
    got = ".rwkvflow/got.json"
    project.dvc("get", ".", "outputs/train/run.json", "--rev", revision, "-o", got)  # what it made is in the cache
    assert project.json(got) == record


def test_what_was_not_saved_is_continued_as_it_began(project):
    with suppress(KeyboardInterrupt), experiment.checkout(project.root, "kept", {"adapter.rank": 5}) as folder:
        (folder / "left").touch()
        raise KeyboardInterrupt
    project.set(train__micro_batch=2)  # the working copy goes on
    with experiment.checkout(project.root, "kept", {"adapter.rank": 5, "train.steps": None}) as again:
        assert again == folder
        assert (again / "left").exists()
        assert params(again)["train"]["micro_batch"] == 4
    assert again.exists()  # nobody saved it
    with experiment.checkout(project.root, "kept", {}):
        experiment.save(folder, "kept")
    assert not folder.exists()
    with experiment.checkout(project.root, "kept", {}) as afresh:
        assert params(afresh)["train"]["micro_batch"] == 2
        experiment.save(afresh, "kept")
    project.run("git", "checkout", "-q", "params.yaml")
    assert not project.run("git", "worktree", "list").stdout.count("experiments")


def test_a_checkout_that_was_half_made_is_made_again(project):
    folder = project.root / experiment.EXPERIMENTS / "half"
    project.run("git", "worktree", "add", "-q", "--detach", "--no-checkout", str(folder))
    with experiment.checkout(project.root, "half", {}):
        assert (folder / "dvc.yaml").exists()
        assert (folder / "outputs/data/train.bin").exists()
        assert (folder / "mine/base.pth").exists()
        experiment.save(folder, "half")


def test_changed_code_and_inputs_come_along(project):
    code = project.root / "rwkv_core/files.py"
    adapter = project.root / "start/mine.pth"
    was = code.read_bytes()
    try:
        code.write_bytes(was + b"\n# changed\n")
        adapter.write_bytes(b"x")
        with experiment.checkout(project.root, "code", {"data.refused": 0.5}) as folder:
            assert (folder / "rwkv_core/files.py").read_bytes() == code.read_bytes()
            assert (folder / "start/mine.pth").read_bytes() == b"x"
            assert not list((folder / "rwkv_core").rglob("__pycache__"))
            revision = experiment.save(folder, "code")
    finally:
        code.write_bytes(was)
        adapter.unlink()
    changed = project.run("git", "diff", "--name-only", "HEAD", revision).stdout.split()
    assert changed == ["dvc.lock", "params.yaml", "rwkv_core/files.py"]  # the adapter is git's no more than it was


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../x", "a..b", "-x", ".x", "x.lock", "é", "x" * 300])
def test_a_name_that_would_break_something_is_refused(project, name):
    with pytest.raises(InputError, match="experiment"), experiment.checkout(project.root, name, {}):
        pass


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"adapter.rank": 0}, r"adapter\.rank = 0"),
        ({"train.optimizer.lrr": 1}, r"did you mean train\.optimizer\.lr"),
        ({"train.optimiser.lr": 1}, r"there is no section train\.optimiser"),
        ({"seed.x": 1}, r"there is no section seed"),
        ({"adapter.state": "wkv"}, r"train\.rows"),
    ],
)
def test_values_are_refused_before_anything_is_made(project, overrides, said):
    with pytest.raises(InputError, match=said), experiment.checkout(project.root, "never", overrides):
        pass
    assert not (project.root / experiment.EXPERIMENTS / "never").exists()


def test_a_checkout_has_one_process_at_a_time(project):
    with experiment.checkout(project.root, "mine", {}) as folder:
        code = (
            "import sys; from pathlib import Path; from flows import experiment\n"
            "with experiment.checkout(Path(sys.argv[1]), 'mine', {}): pass"
        )
        other = subprocess.run(
            [sys.executable, "-c", code, str(project.root)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert "another process works on it" in other.stderr
        with pytest.raises(WorldError), experiment.checkout(project.root, "mine", {}):
            pass
        experiment.save(folder, "mine")


@pytest.mark.slow
def test_many_at_once_are_all_saved(project):
    """Git's and DVC's own lists are shared; nothing of one may get lost for another."""
    before = working_copy(project)
    problems: list[Exception] = []

    def work(number: int) -> None:
        try:
            with experiment.checkout(project.root, f"many-{number}", {"seed": number}) as folder:
                experiment.save(folder, f"many-{number}")
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert working_copy(project) == before
    listed = experiments(project)
    seeds = [listed[f"many-{number}"]["params"]["params.yaml"]["data"]["seed"] for number in range(6)]
    assert seeds == list(range(6))


def test_a_person_without_a_name_can_save(project, tmp_path, monkeypatch):
    for who in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            monkeypatch.delenv(f"GIT_{who}_{what}", raising=False)
    (tmp_path / "gitconfig").write_text("[user]\n\tuseConfigOnly = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    with experiment.checkout(project.root, "nameless", {}) as folder:
        assert experiment.save(folder, "nameless")


def test_a_repository_without_a_commit_is_refused(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    with pytest.raises(InputError, match="there is none"), experiment.checkout(tmp_path, "x", {}):
        pass
