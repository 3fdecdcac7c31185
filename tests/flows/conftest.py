"""A miniature repository with real stages, and a real Prefect server, for all tests of this folder."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from miniature import free_port, make, processes_in, wait_until

from flows.environment import defaults
from tasks.stage import answers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The environment of a session: this interpreter's programs first, nothing reported, nothing in the home folder."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("PREFECT", "MLFLOW", "DVC_", "RWKVFLOW"))]:
            patch.delenv(name)
        for name, value in defaults(home).items():
            patch.setenv(name, value)
        Path(os.environ["PREFECT_HOME"]).mkdir(parents=True)  # Prefect makes the last folder only
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("PREFECT_LOGGING_LEVEL", "INFO")
        yield


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, settings: None) -> Path:
    """The repository that each test gets a copy of."""
    root = tmp_path_factory.mktemp("template")
    make(root)
    return root


@pytest.fixture
def repository(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private copy of the miniature repository, as the current folder."""
    root = tmp_path / "repository"
    shutil.copytree(template, root)
    monkeypatch.chdir(root)
    yield root
    for process in processes_in(root):
        with suppress(psutil.Error):
            process.kill()


@pytest.fixture(scope="session")
def prefect_server(settings: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server without its UI; PREFECT_API_URL names it from here on."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-ui",
    ]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
    try:
        wait_until(lambda: answers(url) or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_API_URL", url)
            from prefect.settings import PREFECT_API_URL, temporary_settings

            with temporary_settings({PREFECT_API_URL: url}):
                yield url
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
