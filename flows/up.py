"""`rwkvflow up`: Prefect, MLflow and the deployments, together on this machine, until told to stop."""

import ctypes
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flows.environment import LOGS, defaults
from flows.signals import stop_on_signal
from rwkv_core.errors import InputError, WorldError
from tasks.record import main_root
from tasks.stage import answers

HOST = "127.0.0.1"
"""No server here knows users or passwords: only this machine may reach them."""

_START = 180.0  # seconds until a server must answer; the first start makes its database
_STOP = 10.0  # seconds for a server to end
_STOP_RUNS = 60.0  # seconds for the deployments to end: a training that runs saves first
_POLL = 0.25  # seconds
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class _Service:
    name: str
    command: list[str]
    ready: Callable[[], bool]
    log: Path
    environment: dict[str, str]
    patience: float = _STOP
    process: subprocess.Popen[bytes] | None = None

    def start(self, root: Path) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                self.command,
                cwd=root,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl+C reaches us alone: we stop them in order
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def check(self) -> None:
        if self.process is not None and self.process.poll() is not None:
            words = self.log.read_text(errors="replace").strip().splitlines()
            last = f"; it last said: {words[-1].strip()}" if words else ""
            ended = f"it ended with exit code {self.process.returncode}{last}"
            raise WorldError(self.name, f"must keep running, but {ended}", f"read {self.log}, then start again")

    def stop(self) -> None:
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.patience)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # whatever it left behind
        self.process.wait()


def up(
    root: Path,
    prefect_port: int,
    mlflow_port: int,
    announce: Callable[[str, str], None],
    retrain_cron: str | None = None,
) -> None:
    """Start both servers and the deployments, and keep them until SIGINT or SIGTERM; then stop them all.

    Args:
        root: the checkout to run pipelines in.
        prefect_port: where Prefect listens.
        mlflow_port: where MLflow listens.
        announce: is given the addresses of both, Prefect's first, once everything answers.
        retrain_cron: when to retrain on new data.

    Raises:
        InputError: a port is taken.
        WorldError: a program did not start, or ended; or this checkout's servers run already.
    """
    home = main_root(root)
    with stop_on_signal() as stop, _only_one(home):
        for option, port in (("--prefect-port", prefect_port), ("--mlflow-port", mlflow_port)):
            _check_free(port, option)
        prefect, mlflow = f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}"
        servers = _servers(home, prefect, mlflow)
        deployments = _deployments(home, prefect, mlflow, retrain_cron)
        try:
            for server in servers:
                server.start(home)
            _wait_ready(servers, servers, stop)
            if not stop.is_set():
                deployments.start(root)
                _wait_ready([deployments], [*servers, deployments], stop)
            if not stop.is_set():
                announce(prefect, mlflow)
            while not stop.wait(_POLL):
                for service in (*servers, deployments):
                    service.check()
        finally:
            for service in (deployments, *servers):  # a run that ends now still tells both servers so
                service.stop()


def _servers(home: Path, prefect: str, mlflow: str) -> list[_Service]:
    settings = defaults(home)
    prefect_port, mlflow_port = prefect.rpartition(":")[2], mlflow.rpartition(":")[2]
    return [
        _Service(
            "Prefect server",
            [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", prefect_port],
            lambda: answers(f"{prefect}/api"),
            home / LOGS / "prefect.log",
            {**settings, "PREFECT_API_URL": f"{prefect}/api"},
        ),
        _Service(
            "MLflow server",
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", mlflow_port, "--workers", "1"),
                *("--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"),
                *("--artifacts-destination", str(home / "mlartifacts")),
            ],
            lambda: answers(mlflow),
            home / LOGS / "mlflow.log",
            {**settings, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # its job workers are for LLM judges
        ),
    ]


def _deployments(home: Path, prefect: str, mlflow: str, retrain_cron: str | None) -> _Service:
    started = time.time()
    address = f"{prefect}/api/deployments/name/pipeline/local"
    return _Service(
        "deployments",
        [sys.executable, "-m", "flows.deployments"],
        lambda: _polled_since(address, started),
        home / LOGS / "deployments.log",
        {
            **defaults(home),
            "PREFECT_API_URL": f"{prefect}/api",
            "MLFLOW_TRACKING_URI": mlflow,
            **({"RWKVFLOW_RETRAIN_CRON": retrain_cron} if retrain_cron else {}),
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",  # seconds until a run that was asked for starts; by itself, 10
        },
        patience=_STOP_RUNS,
    )


def _polled_since(deployment: str, started: float) -> bool:
    """Whether a runner has asked for work since: the server remembers deployments of earlier days too."""
    try:
        with urllib.request.urlopen(deployment, timeout=2) as reply:
            polled = json.load(reply).get("last_polled")
    except (urllib.error.URLError, OSError, ValueError):
        return False
    return polled is not None and datetime.fromisoformat(polled).timestamp() > started


def _wait_ready(awaited: list[_Service], running: list[_Service], stop: threading.Event) -> None:
    deadline = time.monotonic() + _START
    waiting = list(awaited)
    while waiting and not stop.wait(_POLL):
        for service in running:
            service.check()
        waiting = [service for service in waiting if not service.ready()]
        if waiting and time.monotonic() > deadline:
            late = waiting[0]
            raise WorldError(late.name, f"must answer within {_START:.0f} s", f"read {late.log}, then start again")


def _check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            rule = f"must be free on {HOST}, but {(error.strerror or str(error)).lower()}"
            raise InputError(f"port {port}", rule, f"stop what uses it, or choose another with {option}") from None


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    path = home / ".rwkvflow/up.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:  # closing it, or the end of this program however it comes, unlocks it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = f"runs already for {home}, whose databases take one at a time"
            raise WorldError("rwkvflow up", rule, "use it, or stop it with Ctrl+C where it runs") from None
        yield


def _end_with_parent() -> None:
    """Runs in the new process: if this one is killed outright, it is told to end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
