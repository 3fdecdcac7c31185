"""`rwkvflow up`: really started, really used, really stopped."""

import json
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
from miniature import free_port, processes_in, wait_until
from up import call, started

from tasks.stage import answers


def listening(process: subprocess.Popen[bytes]) -> set[str]:
    found = psutil.Process(process.pid).children(recursive=True)
    return {c.laddr.ip for p in found for c in p.net_connections() if c.status == psutil.CONN_LISTEN}


@pytest.mark.slow
def test_up_serves_the_pipeline_and_leaves_nothing_behind(repository: Path):
    """One start, for starting takes long: addresses, a run asked for in the UI, its cancel, and Ctrl+C."""
    prefect, mlflow = free_port(), free_port()
    api = f"http://127.0.0.1:{prefect}/api"
    with started(prefect, mlflow) as (process, output):
        wait_until(lambda: "Ctrl+C" in output.read_text() or process.poll() is not None, 150)
        assert process.poll() is None, output.read_text()
        assert f"http://127.0.0.1:{prefect}" in output.read_text()
        assert f"http://127.0.0.1:{mlflow}" in output.read_text()
        assert answers(api)
        assert answers(f"http://127.0.0.1:{mlflow}")
        assert listening(process) == {"127.0.0.1"}

        Path("behaviour").write_text("slow")
        deployment = call(f"{api}/deployments/name/pipeline/local")
        limits = call(f"{api}/v2/concurrency_limits/filter", {})
        assert ("gpu-0", 1) in [(limit["name"], limit["limit"]) for limit in limits]
        asked = call(f"{api}/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
        run = f"{api}/flow_runs/{asked['id']}"
        wait_until(Path("running").exists, 60)
        call(f"{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
        wait_until(lambda: call(run)["state"]["type"] == "CANCELLED", 40)
        assert Path("saved").exists()
        assert json.loads(Path("stage_environment.json").read_text())["MLFLOW_TRACKING_URI"].endswith(str(mlflow))

        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert not [child for child in children if child.is_running()]
        assert not processes_in(repository)
    assert (repository / "mlflow.db").exists()


@pytest.mark.slow
def test_what_runs_when_up_is_stopped_saves_first(repository: Path):
    prefect, mlflow = free_port(), free_port()
    api = f"http://127.0.0.1:{prefect}/api"
    Path("behaviour").write_text("slow")
    with started(prefect, mlflow) as (process, output):
        wait_until(lambda: "Ctrl+C" in output.read_text(), 150)
        deployment = call(f"{api}/deployments/name/pipeline/local")
        call(f"{api}/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
        wait_until(Path("running").exists, 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    assert Path("saved").exists()
    assert not processes_in(repository)


def test_a_port_that_is_taken(repository: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with started(port, free_port()) as (process, output):
            assert process.wait(30) == 1
        assert f"rwkvflow: port {port}: must be free on 127.0.0.1" in output.read_text()
        assert "--prefect-port" in output.read_text()


@pytest.mark.slow
def test_a_server_that_cannot_start(repository: Path):
    (repository / ".rwkvflow/prefect/prefect.db").mkdir(parents=True)
    with started(free_port(), free_port()) as (process, output):
        assert process.wait(60) == 1
    text = " ".join(output.read_text().split())
    assert "rwkvflow: Prefect server: must keep running, but it ended with exit code 3" in text
    assert ".rwkvflow/logs/prefect.log" in text
    assert not processes_in(repository)


def test_only_one_of_them_at_a_time(repository: Path):
    from flows.up import up
    from rwkv_core.errors import WorldError

    with started(free_port(), free_port()) as (process, _):
        wait_until(Path(".rwkvflow/logs/prefect.log").exists)
        with pytest.raises(WorldError, match="runs already"):
            up(repository, free_port(), free_port(), lambda *_: None, print)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert not processes_in(repository)
