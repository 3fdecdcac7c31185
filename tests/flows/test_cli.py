"""`rwkvflow run`, with a server and without one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from miniature import dvc, free_port, processes_in, wait_until

from flows import cli


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


@pytest.fixture
def no_server(settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")


def test_help_names_the_commands(settings: None):
    code, output = finish(start("--help"))
    assert code == 0
    assert all(command in output for command in ("up", "run", "sync"))


def test_a_problem_is_one_line(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["rwkvflow", "sync"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("rwkvflow: params.yaml: ")


def test_without_a_server_dvc_runs_alone(repository: Path, no_server: None):
    code, output = finish(start("run", "--force", "prepare"))
    assert code == 0
    assert output.startswith("No Prefect server answers at http://127.0.0.1:")
    assert "prepare: reads" in output
    assert not Path("outputs/model.txt").exists()
    assert not Path(".rwkvflow/prefect").exists()
    Path("behaviour").write_text("fail")
    code, output = finish(start("run"))
    assert code == 1
    assert "has no rows; add some" in output


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_without_a_server_a_signal_lets_the_stage_save(repository: Path, no_server: None, number: int):
    Path("behaviour").write_text("slow")
    process = start("run")
    wait_until(Path("running").exists)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 130
    assert "train: saved at step 7 and stopped" in output
    assert Path("saved").exists()
    assert not processes_in(repository)


def test_with_a_server_the_run_is_a_flow(repository: Path, prefect_server: str):
    Path("behaviour").write_text("fail")
    code, output = finish(start("run"))
    assert code == 1
    assert "stage train failed: data/x.jsonl: has no rows; add some" in output


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_with_a_server_a_signal_lets_the_stage_save(repository: Path, prefect_server: str, number: int):
    Path("behaviour").write_text("slow")
    process = start("run")
    wait_until(Path("running").exists)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 130
    assert "Finished in state Cancelled" in output
    assert Path("saved").exists()
    assert not processes_in(repository)
    Path("behaviour").write_text("ok")
    dvc("repro")


def test_the_interpreter_of_the_stages_is_ours(repository: Path, no_server: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", os.defpath)
    Path("tasks/prepare.py").write_text("import sys; print('python is', sys.executable)")
    _, output = finish(start("run", "--force", "prepare"))
    assert f"python is {Path(sys.executable).parent}" in output
