"""Sweeps: their spaces, and real ones on a project whose training takes a moment."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from arms import quick
from miniature import processes_in, wait_until
from project import ROOT
from ruamel.yaml import YAML

from flows import arms, compare, experiment
from flows.arms import Result, Sweep, Told
from flows.pareto import draw, markdown
from rwkv_core.errors import InputError

PATIENCE = 500  # seconds: for a hang only


def space(**changes) -> Sweep:
    return Sweep(**{"name": "s", "grid": {"adapter.rank": [2, 4]}} | changes)


def test_a_grid_is_all_combinations_with_what_is_drawn_for_each():
    drawn = {
        "train.optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "seed": {"low": 1, "high": 3, "integer": True},
    }
    of = {"grid": {"adapter.rank": [2, 4], "data.holdout.fraction": [0.1, 0.2]}, "fixed": {"train.epochs": 1}}
    found = space(**of, random={"count": 5, "seed": 1, "space": drawn}).arms()
    assert len(found) == len({arm.name for arm in found}) == 20
    assert all(1e-4 <= arm.chosen["train.optimizer.lr"] <= 1e-2 and arm.chosen["seed"] in (1, 2, 3) for arm in found)
    assert all(arm.values["train.epochs"] == 1 for arm in found)
    assert len({json.dumps(arm.inputs) for arm in found}) == 2
    more = space(**of, random={"count": 6, "seed": 1, "space": drawn}).arms()
    assert {arm.name for arm in found} < {arm.name for arm in more}
    assert not {arm.name for arm in found} & {
        arm.name for arm in space(**of, random={"count": 5, "seed": 2, "space": drawn}).arms()
    }


def test_equal_arms_are_one():
    assert len(space(random={"count": 9, "seed": 0, "space": {"seed": {"choices": [7]}}}).arms()) == 2


def test_a_range_is_drawn_from_whole():
    drawn = space(random={"count": 200, "seed": 0, "space": {"seed": {"low": 1, "high": 4, "integer": True}}}).arms()
    assert {arm.chosen["seed"] for arm in drawn} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a b\ngrid: {seed: [1]}", "name = 'a b'"),
        ("name: a", "there is nothing to try"),
        ("name: a\ngrid: {seed: []}", "grid.seed"),
        ("name: a\ngrid: {seed: [1]}\nfixed: {seed: 2}", "seed is in two of"),
        ("name: a\ngrid: {train.halt: [20]}\nhalving: {first: 20, unit: steps, factor: 2}", "halving sets train.halt"),
        ("name: a\nrandom: {count: 1, seed: 0, space: {seed: {low: 3, high: 1}}}", "low must be below high"),
        ("name: a\nrandom: {count: 1, seed: 0, space: {seed: {low: 3}}}", "has either choices, or low and high"),
        ("name: a\ngird: {seed: [1]}", "did you mean grid"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path, text, said):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        arms.read(tmp_path / "s.yaml")


def test_the_table_and_the_chart_show_what_nothing_is_better_than(tmp_path):
    found = space(grid={"adapter.rank": [1, 2, 3, 4]}).arms()
    results = [
        Result(1.0, 9, 9, 9, 5, 5, "r", "v"),
        Result(2.0, 1, 9, 9, 5, 5, "r", "v"),
        Result(2.1, 2, 9, 9, 5, 5, "r", "v"),
    ]
    told = [Told(arm, result, None, 0, True) for arm, result in zip(found, results, strict=False)]
    told.append(Told(found[3], None, "a | b", 0, False))
    lines = markdown(space(), told).splitlines()
    assert [line.startswith("| **") for line in lines[4:]] == [True, True, False, False]
    assert lines[-1].endswith(r"| failed: a \| b |")
    for _ in range(2):
        draw(told, tmp_path / "a.png")
        draw(told, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = quick(tmp_path_factory.mktemp("sweep") / "a place")
    project.run("git", "config", "gc.auto", "0")
    yield project
    for process in processes_in(project.root):
        process.kill()


def sweep(project, name: str, *, check: bool = True, **content):
    (project.root / "sweep.json").write_text(json.dumps({"name": name, **content}))  # JSON is YAML
    return project.run(sys.executable, "-m", "flows.cli", "sweep", "sweep.json", check=check)


def ran(project) -> list[str]:
    """A line for each training since the last call, in order."""
    file = project.root / "ran"
    lines = [line.strip() for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def table(project, name: str) -> list[list[str]]:
    lines = (project.root / f"sweeps/{name}/table.md").read_text().splitlines()[4:]
    return [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.slow
def test_eight_arms_in_two_slots_whatever_becomes_of_some(project, monkeypatch):
    (project.root / "together").unlink(missing_ok=True)
    (project.root / "takes").write_text("1")
    status = project.run("git", "status", "--short").stdout
    monkeypatch.setitem(project.environment, "CUDA_VISIBLE_DEVICES", "5,7")
    ranks = [2, 4, 6, 8, 10, 11, 12, 13]
    try:
        printed = sweep(project, "eight", grid={"adapter.rank": ranks}, slots=2).stdout
    finally:
        (project.root / "takes").write_text("0")
    rows = table(project, "eight")
    assert [row[1] for row in rows] == ["12", "11", "10", "8", "6", "4", "2", "13"]
    assert rows[-1][-1] == "failed: train: adapter.rank = 13: brings bad luck; take another"
    assert printed.count("Running stage 'prepare'") == 1
    lines = ran(project)
    assert len(lines) == 9  # the eleventh was killed, and went on
    assert {line.split()[-1] for line in lines} == {"5", "7"}
    assert set((project.root / "together").read_text().split()) <= {"1", "2"}
    listed = project.run("git", "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps").stdout.split()
    assert {row[0] for row in rows[:-1]} == {name for name in listed if name.startswith("eight")}
    assert (
        project.run("git", "status", "--short").stdout.replace("?? sweep.json\n", "").replace("?? sweeps/\n", "")
        == status
    )
    again = sweep(project, "eight", grid={"adapter.rank": [*ranks[:-1], 14]}, slots=2).stdout
    assert [line.split()[0] for line in ran(project)] == ["14"]  # only what is missing
    assert "8 arms to the end, 1 of them still to do" in again
    names = [row[0] for row in rows[:2]]
    said = compare.compare(project.root, names)
    assert [line.split()[0] for line in said.splitlines() if line.startswith("adapter.")] == ["adapter.rank"]
    params = said.partition("\n\n")[0].splitlines()
    assert len(params) == 3
    assert params[-1].split() == ["adapter.rank", "12", "11"]


@pytest.mark.slow
def test_a_sweep_that_is_killed_comes_to_the_same(project):
    content = {"grid": {"train.optimizer.lr": [0.004, 0.008, 0.002, 0.006]}, "slots": 2, "fixed": {"adapter.rank": 2}}
    sweep(project, "whole", **content)
    ran(project)
    (project.root / "takes").write_text("4")
    (project.root / "sweep.json").write_text(json.dumps({"name": "killed", **content}))
    command = [sys.executable, "-m", "flows.cli", "sweep", "sweep.json"]
    process = subprocess.Popen(
        command, cwd=project.root, env=project.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    notes = project.root / ".rwkvflow/sweeps/killed/arms"
    wait_until(lambda: list(notes.glob("*.json")) and len(list((project.root / "going").iterdir())), PATIENCE)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (project.root / "takes").write_text("0")
    before = {path.name: path.read_bytes() for path in notes.glob("*.json")}
    assert 0 < len(before) < 4
    wait_until(lambda: not processes_in(project.root), PATIENCE)  # what trains goes on alone
    for left in (project.root / "going").iterdir():
        left.unlink()
    sweep(project, "killed", **content)
    assert {name: data for name, data in _notes(notes).items() if name in before} == before
    lines = ran(project)
    assert len(lines) == 4, lines  # none twice
    whole, killed = table(project, "whole"), table(project, "killed")
    assert [row[1:] for row in killed] == [row[1:] for row in whole]


def _notes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_saves_and_says_so(project):
    (project.root / "takes").write_text("600")
    (project.root / "sweep.json").write_text(json.dumps({"name": "asked", "grid": {"adapter.rank": [2, 3]}}))
    command = [sys.executable, "-m", "flows.cli", "sweep", "sweep.json"]
    process = subprocess.Popen(
        command, cwd=project.root, env=project.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    going = project.root / "going"
    wait_until(lambda: going.exists() and list(going.iterdir()), PATIENCE)
    process.terminate()
    printed, _ = process.communicate(timeout=PATIENCE)
    (project.root / "takes").write_text("0")
    for left in going.iterdir():
        left.unlink()
    assert process.returncode == 130
    assert "the same sweep again goes on from there" in printed
    assert not processes_in(project.root)


def test_two_at_once_of_the_same_name_are_refused(project, monkeypatch):
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    one = arms.State(project.root, space(name="alone"))
    with one, pytest.raises(Exception, match="another process runs it"), arms.State(project.root, space(name="alone")):
        pass
    with (
        pytest.raises(InputError, match=r"adapter\.rank = 0"),
        arms.State(project.root, space(grid={"adapter.rank": [2, 0]})),
    ):
        pass


def test_the_rungs_of_halving(project, monkeypatch):
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    halving = {"first": 6, "unit": "steps", "factor": 3}
    with arms.State(project.root, space(name="rungs", grid={"seed": list(range(10))}, halving=halving)) as state:
        found = [(count, until(state.arms[0])) for count, until in state.rungs()]
        assert found == [(10, 10), (3, 20), (1, None)]  # 6 and 18 steps, at a measurement: every 5
    tokens = {"first": 1000, "unit": "tokens", "factor": 2}
    grid = {"train.ctx_len": [32, 64]}
    with arms.State(project.root, space(name="tokens", grid=grid, halving=tokens)) as state:
        (_, until), _ = state.rungs()
        assert [until(arm) for arm in state.arms] == [10, 5]  # rows of 32 and 64 tokens, four a step


def test_the_example_is_valid_on_the_demo():
    text = (ROOT / "params.yaml").read_text()
    found = arms.read(ROOT / "demo/sweep.yaml").arms()
    assert len(found) == 8
    for arm in found:
        experiment.overridden(text, arm.values)
    shown = (ROOT / "docs/experiments.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert YAML(typ="safe").load(shown) == YAML(typ="safe").load((ROOT / "demo/sweep.yaml").read_text())
