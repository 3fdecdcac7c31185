"""`rwkvflow plan` on a real base."""

import json
import shutil

import pytest
from project import ROOT, Project, write_base
from typer.testing import CliRunner

from flows import cli
from rwkv_core.errors import InputError


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with a base of two layers, before data is prepared."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    write_base(tmp_path / "base.pth")
    found = Project(tmp_path, {})
    found.set(model__base="base.pth", adapter__rank=2, train__ctx_len=2048, train__micro_batch=8, train__accumulate=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return found


def plan(*words):
    done = CliRunner().invoke(cli.app, ["plan", *words])
    if done.exception is not None:
        raise done.exception
    return done.output


def told(*words):
    return json.loads(plan("--json", "--no-speed", *words))


def test_the_table_has_the_terms_and_what_there_is(project):
    output = plan("--no-speed")
    for words in (
        "RWKV-7, 2 layers of 32",
        "frozen weights",
        "kept for the backward",
        "process",
        "memory of this machine",
    ):
        assert words in output
    assert "the data is not prepared" in output
    assert "one of 1" not in output


@pytest.mark.slow
def test_a_card_is_solved_for_and_what_is_found_fits(project):
    wanted = told("--gpu-memory", "24GB")
    assert wanted["fits"]
    assert wanted["nearest"] is None
    assert wanted["peak"] == sum(wanted["terms"].values())
    less = f"{wanted['peak'] // 2**20 - 20}MB"
    solved = told("--gpu-memory", less, "--solve")
    assert not solved["fits"]
    assert solved["nearest"]["set"]
    assert solved["nearest"]["peak"] <= solved["room"]
    assert all(name in plan("--gpu-memory", less, "--no-speed") for name in solved["nearest"]["set"])
    project.set(**{name.replace(".", "__"): value for name, value in solved["nearest"]["set"].items()})
    again = told("--gpu-memory", less)
    assert again["fits"]
    assert again["peak"] == solved["nearest"]["peak"]


def test_several_processes_have_a_plan_each(project):
    alone = told("--gpu-memory", "24GB")
    project.set(train__parallel__strategy="deepspeed_stage_2", train__parallel__devices=4)
    shared = told("--gpu-memory", "24GB")
    assert shared["processes"] == 4
    assert 4 * shared["terms"]["optimizer moments"] == alone["terms"]["optimizer moments"]


def test_what_nothing_fits_into_is_said(project):
    with pytest.raises(InputError, match="no settings of the same steps fit into"):
        plan("--gpu-memory", "1MB", "--solve", "--no-speed")
    with pytest.raises(InputError, match="write it as 24GB"):
        plan("--gpu-memory", "a lot")
