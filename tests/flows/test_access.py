"""Servers that listen beyond this machine: nobody gets in without the password, and a pipeline runs with it."""

import base64
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from miniature import free_port, processes_in, wait_until

from flows import access
from rwkv_core.errors import InputError, WorldError

ROOT = Path(__file__).parents[2]


def test_the_password_is_its_owner_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert access.password(tmp_path) is None
    made = access.password(tmp_path, make=True)
    assert made == access.password(tmp_path)
    path = tmp_path / access.FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(WorldError, match="by its owner alone; chmod 600"):
        access.password(tmp_path)
    monkeypatch.setenv(access.VARIABLE, "too short")
    with pytest.raises(InputError, match="12 characters"):
        access.password(tmp_path)


@pytest.mark.parametrize(("host", "own"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)])
def test_which_addresses_are_this_machine_s_own(host: str, own: bool):
    assert access.is_loopback(host) is own


def test_what_is_no_address_is_said():
    with pytest.raises(InputError, match="--host example"):
        access.is_loopback("example")


def status(url: str, word: str | None = None) -> int:
    given = {"Authorization": f"Basic {base64.b64encode(f'{access.USER}:{word}'.encode()).decode()}"} if word else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=given), timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_both_servers_ask_and_a_pipeline_runs(repository: Path):
    prefect, mlflow = free_port(), free_port()
    ports = ["--host", "0.0.0.0", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow)]
    output = Path("up.txt")
    with output.open("wb") as sink:
        up = subprocess.Popen([sys.executable, "-m", "flows.cli", "up", *ports], stdout=sink, stderr=sink)
    try:
        wait_until(lambda: "Ctrl+C" in output.read_text() or up.poll() is not None, 400)
        assert up.poll() is None, output.read_text()
        word = (repository / access.FILE).read_text().strip()
        runs = f"http://127.0.0.1:{mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0"
        for url in (f"http://127.0.0.1:{prefect}/api/admin/version", runs):
            assert status(url) == 401
            assert status(url, "not the password") == 401
            assert status(url, word) == 200
        kept = os.environ | {"PYTHONPATH": str(ROOT)}
        kept = {name: value for name, value in kept.items() if name != "PREFECT_API_URL"}
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", "run"], env=kept, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Finished in state Completed" in done.stdout + done.stderr  # a flow run, on the server
        assert '"MLFLOW_TRACKING_PASSWORD"' in Path("stage_environment.json").read_text()
        for process in psutil.Process(up.pid).children(recursive=True):
            assert word not in " ".join(process.cmdline())
        said = [output, *Path(".rwkvflow/logs").iterdir(), *Path("outputs").iterdir()]
        assert word not in done.stdout + done.stderr + "".join(path.read_text(errors="replace") for path in said)
    finally:
        up.terminate()
        up.wait(120)
    assert not processes_in(repository)
