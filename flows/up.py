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
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

from flows import access, life
from flows.environment import LOGS, RETRAIN_CRON, defaults
from flows.signals import stop_on_signal
from rwkv_core.errors import InputError, WorldError
from tasks.mlflow_run import DATABASE, make_database
from tasks.record import main_root
from tasks.stage import answers

HOST = "127.0.0.1"
"""Where the servers listen unless asked otherwise: only this machine reaches them, and they ask nobody who he is."""

RESTARTS = 5
"""How often a server that ended is started again within `WINDOW`, after 1, 2, 4, ... seconds."""

WINDOW = 600.0
"""Seconds."""

_LOCK = Path(".rwkvflow/up.lock")
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
    owns_group: bool = True
    """What it leaves behind when it dies is ended too: it may hold the port. Flow runs outlive their runner."""
    process: subprocess.Popen[bytes] | None = None
    deaths: list[float] = field(default_factory=list)
    due: float | None = None

    def start(self, root: Path) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab" if self.deaths else "wb") as sink:
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

    def revive(self, root: Path, say: Callable[[str], None]) -> None:
        """Start it again if it has ended, but not for ever."""
        now = time.monotonic()
        if self.due is not None:
            if now >= self.due:
                self.due = None
                self.start(root)
            return
        if self.process is None or self.process.poll() is None:
            return
        self.deaths = [*(death for death in self.deaths if now - death < WINDOW), now]
        count = len(self.deaths)
        if count > RESTARTS:
            self.check()
        if self.owns_group:
            self._kill_group()
        pause = 2.0 ** (count - 1)
        self.due = now + pause
        code = self.process.returncode
        say(f"{self.name} ended with exit code {code}; starting it again in {pause:.0f} s ({count} of {RESTARTS})")

    def _kill_group(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.patience)
        self._kill_group()  # whatever it left behind
        self.process.wait()


def up(
    root: Path,
    prefect_port: int,
    mlflow_port: int,
    announce: Callable[[str, str], None],
    say: Callable[[str], None],
    host: str = HOST,
    retrain_cron: str | None = None,
) -> None:
    """Start both servers and the deployments, and keep them until SIGINT or SIGTERM; then stop them all.

    A program that ends meanwhile is started again, up to `RESTARTS` times.

    Args:
        root: the checkout to run pipelines in.
        prefect_port: where Prefect listens.
        mlflow_port: where MLflow listens.
        announce: is given the addresses of both, Prefect's first, once everything answers.
        say: is told of programs that had to be started again.
        host: the address to listen at. Unless it is this machine's own, the servers ask for a password (flows/access.py).
        retrain_cron: when to retrain on new data.

    Raises:
        InputError: a port is taken; the host is no address; the password is too short.
        WorldError: a program did not start, or ended too often; or this checkout's servers run already; or others can read the
            password.
    """
    home = main_root(root)
    with stop_on_signal() as stop, _only_one(home) as note:
        word = None if access.is_loopback(host) else access.password(home, make=True)
        for option, port in (("--prefect-port", prefect_port), ("--mlflow-port", mlflow_port)):
            _check_free(host, port, option)
        here = {"0.0.0.0": HOST, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        prefect, mlflow = f"http://{here}:{prefect_port}", f"http://{here}:{mlflow_port}"
        servers = _servers(home, host, prefect, mlflow, word)
        deployments = _deployments(home, prefect, mlflow, word, retrain_cron)
        note.write(json.dumps({"prefect": f"{prefect}/api", "mlflow": mlflow, "password": word is not None}))
        note.flush()
        try:
            make_database(home / DATABASE)
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
                    service.revive(home if service in servers else root, say)
        finally:
            deployments.stop()
            _stop_runs(home)
            for service in servers:  # a run that ends now still tells both servers so
                service.stop()


def addresses(root: Path) -> dict[str, str]:
    """Variables for a program that uses the servers of this checkout's `rwkvflow up`; none, if it does not run."""
    home = main_root(root)
    with suppress(FileNotFoundError), (home / _LOCK).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(ValueError, KeyError):
                told = json.load(file)
                found = {"PREFECT_API_URL": told["prefect"], "MLFLOW_TRACKING_URI": told["mlflow"]}
                word = access.password(home) if told["password"] else None
                return found | (access.of_clients(word) if word is not None else {})
    return {}


def _stop_runs(home: Path) -> None:
    """Flow runs whose runner was killed before: told to save and stop, as it would have told them."""
    runs = [told["pid"] for told in life.living(home) if told.get("served")]
    for number, seconds in ((signal.SIGTERM, _STOP_RUNS), (signal.SIGKILL, _STOP)):
        for run in runs:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(run, number)
        deadline = time.monotonic() + seconds
        while runs and time.monotonic() < deadline:
            left = [told["pid"] for told in life.living(home) if told.get("served")]
            runs = [run for run in runs if run in left]
            time.sleep(_POLL)


def _servers(home: Path, host: str, prefect: str, mlflow: str, word: str | None) -> list[_Service]:
    settings = defaults(home)
    prefect_port, mlflow_port = prefect.rpartition(":")[2], mlflow.rpartition(":")[2]
    return [
        _Service(
            "Prefect server",
            [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", prefect_port],
            lambda: answers(f"{prefect}/api"),
            home / LOGS / "prefect.log",
            {
                **settings,
                "PREFECT_API_URL": f"{prefect}/api",
                "PREFECT_UI_API_URL": "/api",  # the browser may be elsewhere
                # slots that are taken outlive the server; by itself it forgets who has them, and they stay taken
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
                **(access.of_prefect(word) if word is not None else {}),
            },
        ),
        _Service(
            "MLflow server",
            [
                *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", mlflow_port, "--workers", "1"),
                *(("--app-name", "basic-auth") if word is not None else ()),
                *("--backend-store-uri", f"sqlite:///{home / DATABASE}"),
                *("--artifacts-destination", str(home / "mlartifacts")),
            ],
            lambda: answers(mlflow),
            home / LOGS / "mlflow.log",
            {
                **settings,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its job workers are for LLM judges
                **(access.of_mlflow(home, word) if word is not None else {}),
            },
        ),
    ]


def _deployments(home: Path, prefect: str, mlflow: str, word: str | None, retrain_cron: str | None) -> _Service:
    started = time.time()
    clients = access.of_clients(word) if word is not None else {}
    address = f"{prefect}/api/deployments/name/pipeline/local"
    return _Service(
        "deployments",
        [sys.executable, "-m", "flows.deployments"],
        lambda: _polled_since(address, started, clients),
        home / LOGS / "deployments.log",
        {
            **defaults(home),
            "PREFECT_API_URL": f"{prefect}/api",
            "MLFLOW_TRACKING_URI": mlflow,
            **({RETRAIN_CRON: retrain_cron} if retrain_cron else {}),
            "PREFECT_RUNNER_POLL_FREQUENCY": "2",  # seconds until a run that was asked for starts; by itself, 10
            **clients,
        },
        patience=_STOP_RUNS,
        owns_group=False,
    )


def _polled_since(deployment: str, started: float, clients: dict[str, str]) -> bool:
    """Whether a runner has asked for work since: the server remembers deployments of earlier days too."""
    try:
        asked = urllib.request.Request(deployment, headers=access.header(clients))
        with urllib.request.urlopen(asked, timeout=2) as reply:
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


def _check_free(host: str, port: int, option: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            rule = f"must be free on {host}, but {(error.strerror or str(error)).lower()}"
            raise InputError(f"port {port}", rule, f"stop what uses it, or choose another with {option}") from None


@contextmanager
def _only_one(home: Path) -> Iterator[TextIO]:
    """Yields a file that says where the servers are, for as long as they run."""
    path = home / _LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(
        "a+", encoding="utf-8"
    ) as file:  # closing it, or the end of this program however it comes, unlocks it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = f"runs already for {home}, whose databases take one at a time"
            raise WorldError("rwkvflow up", rule, "use it, or stop it with Ctrl+C where it runs") from None
        file.truncate(0)
        yield file


def _end_with_parent() -> None:
    """Runs in the new process: if this one is killed outright, it is told to end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
