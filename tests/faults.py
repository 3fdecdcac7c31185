"""A pipeline whose programs are killed: what it takes to do that to a real one, and to see what is left."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from miniature import free_port, make, processes_in

ROOT = Path(__file__).parent.parent
LIVE = ["RUNNING", "PENDING", "CANCELLING"]

TARGETS = ("Prefect server", "MLflow server", "deployments", "flow run", "dvc", "train", "everything")
"""What is killed, with SIGKILL: one process, or every one that there is, this machine's power cut."""

# A training that takes seconds, has a checkpoint a step, and ends with the same bytes however often it is continued.
TRAIN = """
import hashlib, signal, time
from pathlib import Path
from rwkv_core.errors import Interrupted
from rwkv_core.files import whole_file
from tasks import stage

def train():
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    kept, value = Path(".rwkvflow/checkpoint"), (0, Path("outputs/data.txt").read_text())
    if kept.exists():
        step, text = kept.read_text().split(" ", 1)
        value = int(step), text
    for step in range(value[0], 40):
        time.sleep(0.1)
        value = step + 1, hashlib.sha256(f"{step}{value[1]}".encode()).hexdigest()
        with whole_file(kept) as temporary:
            temporary.write_text(f"{value[0]} {value[1]}")
        print(f"step {value[0]}/40", flush=True)
        if asked:
            raise Interrupted(signal.SIGTERM, f"saved at step {value[0]}")
    Path("outputs/model.txt").write_text(value[1])
    Path("outputs/metrics.json").write_text("{}")
    kept.unlink()

stage.main(train)
"""


def project(root: Path) -> None:
    """Make the repository."""
    make(root)
    (root / "tasks/train.py").write_text(TRAIN)
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qam", "train"], cwd=root, check=True
    )


class Operated:
    """The repository with `rwkvflow up`, and the questions that one asks of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.prefect, self.mlflow = root, free_port(), free_port()
        self.api = f"http://127.0.0.1:{self.prefect}/api"
        self.up: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start `rwkvflow up`, and wait until it serves."""
        ports = ["--prefect-port", str(self.prefect), "--mlflow-port", str(self.mlflow)]
        said = self.root / "up.txt"
        with said.open("wb") as sink:
            command = [sys.executable, "-m", "flows.cli", "up", *ports]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            self.up = subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=sink, stderr=sink, start_new_session=True
            )
        self.wait(lambda: "Ctrl+C" in said.read_text() or self.up.poll() is not None)
        assert self.up.poll() is None, said.read_text()

    def stop(self) -> None:
        """Stop it as a person does."""
        if self.up is not None and self.up.poll() is None:
            self.up.terminate()
            self.up.wait(120)

    def wait(self, condition: Any, seconds: float = 300) -> None:
        """Until something is so; a hang is a failure."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited too long; {self.runs()}"
            time.sleep(0.2)

    def call(self, path: str, body: Any = None) -> Any:
        """Ask the server; None while it is away."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.api}{path}", data=data, headers={"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                text = reply.read()
        except (urllib.error.URLError, OSError):
            return None
        return json.loads(text) if text else {}

    def ask(self) -> str:
        """Ask for a flow run of the deployment, as the UI does; its id."""
        asked: list[str] = []

        def accepted() -> bool:
            deployment = self.call("/deployments/name/pipeline/local")
            run = deployment and self.call(
                f"/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}}
            )
            asked.extend([run["id"]] if run else [])
            return bool(asked)

        self.wait(accepted)
        return asked[0]

    def state(self, run: str) -> str:
        """Of a flow run; empty while the server is away."""
        found = self.call(f"/flow_runs/{run}")
        return found["state"]["type"] if found else ""

    def ended(self, run: str) -> str:
        """Wait until it has, and say how."""
        self.wait(lambda: self.state(run) not in ("", "SCHEDULED", *LIVE))
        return self.state(run)

    def runs(self) -> list[tuple[str, str]] | None:
        """Flow runs and task runs that are shown as living; None while the server is away."""
        live = {"state": {"type": {"any_": LIVE}}}
        flows = self.call("/flow_runs/filter", {"flow_runs": live})
        tasks = self.call("/task_runs/filter", {"task_runs": live})
        return (
            None
            if flows is None or tasks is None
            else [(run["name"], run["state_type"]) for run in (*flows, *tasks) if run["state_name"] != "NotReady"]
        )

    def logs(self, run: str) -> list[str]:
        """Of a flow run."""
        this = {"flow_run_id": {"any_": [run]}}
        return [entry["message"] for entry in self.call("/logs/filter", {"logs": this}) or []]

    def slots(self) -> dict[str, int] | None:
        """Which are taken; None while the server is away."""
        found = self.call("/v2/concurrency_limits/filter", {})
        return None if found is None else {limit["name"]: limit["active_slots"] for limit in found}

    def processes(self, name: str) -> list[psutil.Process]:
        """Of this repository, by what their command line has."""
        signs = {
            "Prefect server": ("prefect", "server", "start"),
            "MLflow server": ("mlflow", "server"),
            "deployments": ("flows.deployments",),
            "flow run": ("prefect.engine",),
            "dvc": ("dvc", "repro", "train"),
            "train": ("tasks.train",),
            "everything": (),
        }
        found = []
        for process in processes_in(self.root):
            with suppress(psutil.Error):
                if all(sign in " ".join(process.cmdline()) for sign in signs[name]):
                    found.append(process)
        return found

    def kill(self, name: str) -> bool:
        """With SIGKILL; whether there was anything."""
        victims = self.processes(name)
        for victim in victims if name == "everything" else victims[:1]:
            with suppress(psutil.Error):
                victim.kill()
        return bool(victims)

    def fresh(self) -> None:
        """As if nothing had been run but the first stages."""
        subprocess.run(["git", "checkout", "-q", "."], cwd=self.root, check=True)
        for name in ("outputs/model.txt", "outputs/report.txt", "outputs/metrics.json", ".rwkvflow/checkpoint"):
            (self.root / name).unlink(missing_ok=True)
        shutil.rmtree(self.root / ".dvc/cache/runs", ignore_errors=True)


@contextmanager
def operated(root: Path) -> Iterator[tuple[Operated, dict[str, bytes]]]:
    """The repository, served; and what a pipeline that nothing happens to leaves in it."""
    project(root)
    here = Operated(root)
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = left(root)
    here.fresh()
    try:
        here.start()
        yield here, wanted
        here.stop()
        assert not processes_in(root)
    finally:
        for process in processes_in(root):
            with suppress(psutil.Error):
                process.kill()


def left(root: Path) -> dict[str, bytes]:
    """What a pipeline has left: dvc.lock, the model, the report."""
    return {name: (root / name).read_bytes() for name in ("dvc.lock", "outputs/model.txt", "outputs/report.txt")}


def fault(here: Operated, wanted: dict[str, bytes], target: str, delay: float) -> str:
    """Start a pipeline, kill something of it, start again what must be; the same result, and nothing left behind.

    Args:
        here: the repository.
        wanted: what it has to come to.
        target: one of `TARGETS`.
        delay: seconds after it is there, or after the flow run has begun.

    Returns:
        What happened, in words.
    """
    here.fresh()
    run = here.ask()
    here.wait(lambda: here.processes(target) if target != "everything" else here.state(run) == "RUNNING")
    time.sleep(delay)
    hit = here.kill(target)
    began = time.monotonic()
    if target == "everything":
        here.up.wait()
        here.start()
    ending, tries = here.ended(run), 0
    while ending != "COMPLETED":
        assert tries < 3, f"{target} after {delay:.1f} s: {ending}"
        ending, tries = here.ended(here.ask()), tries + 1
    assert left(here.root) == wanted
    here.wait(lambda: here.runs() == [])
    here.wait(lambda: not any((here.slots() or {"away": 1}).values()))
    here.wait(lambda: not here.processes("flow run") and not here.processes("dvc") and not here.processes("train"))
    locks = here.root / ".dvc/tmp/rwlock"
    held = json.loads(locks.read_text()) if locks.exists() and locks.read_text() else {}
    assert not any(held.values()), held
    return (
        f"{target if hit else 'nothing, it was gone'} after {delay:.1f} s: {tries} more runs, "
        f"whole again after {time.monotonic() - began:.0f} s"
    )


def plan(count: int, seed: int) -> list[tuple[str, float]]:
    """What to kill and when, each target as often as the others."""
    draw = random.Random(seed)
    targets = [TARGETS[i % len(TARGETS)] for i in range(count)]
    draw.shuffle(targets)
    brief = ("dvc", "train")
    return [(target, draw.uniform(0, 3 if target in brief else 9)) for target in targets]


def end_with(number: signal.Signals) -> None:
    """For a program that runs these by hand: Ctrl+C still stops what was started."""
    signal.signal(number, lambda *_: sys.exit(1))
