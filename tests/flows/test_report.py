"""The report of a run, as markdown."""

import json
import time
from pathlib import Path

import pytest
from miniature import free_port

from flows.graph import Stage


def test_metrics_are_tables_and_what_is_no_metrics_file_is_said(repository: Path, monkeypatch: pytest.MonkeyPatch):
    from prefect.states import Completed, Failed, Pending

    from flows.report import markdown

    good, bad = repository / "good.json", repository / "bad.json"
    good.write_text(json.dumps({"loss": {"base": 2.5000001, "tuned": 1}, "name": "a|b"}))
    bad.write_text("{")
    stages = [
        Stage("train", (), (good,)),
        Stage("merge", (), (bad, repository / "absent.json")),
        Stage("export", (), ()),
    ]
    states = {
        "train": Completed(name="Cached"),
        "merge": Failed(message="two\nlines"),
        "export": Pending(name="NotReady", message="Upstream task run"),
    }
    text = markdown(stages, states)
    for row in (
        "| train | Cached |  |",
        "| merge | Failed | two lines |",
        "| export | not run | a stage that it needs did not succeed |",
        "| good.json | value |",
        "| loss.base | 2.5 |",
        "| loss.tuned | 1 |",
        "| name | a\\|b |",
        "bad.json: is not JSON",
    ):
        assert row in text
    assert "MLflow" not in text


def test_an_mlflow_that_is_away_does_not_hold_the_run_up(repository: Path, monkeypatch: pytest.MonkeyPatch):
    from flows.report import markdown

    away = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", away)
    start = time.monotonic()
    assert f"Training in MLflow: [all runs]({away})" in markdown([], {})
    assert time.monotonic() - start < 5


def test_the_data_s_lengths_and_faults_are_there(repository: Path, monkeypatch: pytest.MonkeyPatch):
    from flows.report import markdown

    monkeypatch.chdir(repository)
    assert "likely wrong" not in markdown([], {})
    folder = repository / "outputs/data"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"train": {"lengths": {"64": 7}}, "lints": {"mojibake": 3}}))
    (repository / "outputs/preview").mkdir()
    (repository / "outputs/preview/preview.html").write_text("")
    text = markdown([], {})
    assert "| tokens up to | documents |\n| --- | --- |\n| 64 | 7 |" in text
    assert "| mojibake | 3 |" in text
    assert f"`{repository / 'outputs/preview/preview.html'}`" in text


def test_what_people_and_stages_write_is_no_markup(repository: Path, monkeypatch: pytest.MonkeyPatch):
    from prefect.states import Failed

    from flows.report import markdown

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    evil = "data/<img src=x onerror=alert(1)>|[here](javascript:alert(1))`*.jsonl"
    metrics = repository / "m.json"
    metrics.write_text(json.dumps({evil: evil}))
    text = markdown([Stage("train", (), (metrics,))], {"train": Failed(message=evil)})
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;\\|\\[here\\](javascript:alert(1))\\`\\*.jsonl" in text
    assert "](javascript" not in text.replace("\\]", "")
    assert "secret" not in text
