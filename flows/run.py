"""`rwkvflow run`: the pipeline flow where a Prefect server answers, plain DVC where none does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.environment import MLFLOW, PREFECT_API, set_defaults
from flows.graph import ask_to_stop
from flows.life import told_by
from flows.signals import stop_on_signal
from flows.up import addresses
from rwkv_core.errors import WorldError
from tasks.stage import answers

STOPPED = 128 + signal.SIGINT
"""Exit code of a run that was asked to stop, and did."""

_POLL = 0.1  # seconds


def run(root: Path, targets: Sequence[str], *, force: bool, say: Callable[[str], None]) -> int:
    """Bring `targets` up to date in `root`, which is the current folder.

    Returns:
        0 done, 1 failed, 130 stopped.
    """
    set_defaults(root)
    if not os.environ.get("PREFECT_API_URL"):  # a server that a person names has its own password, if any
        os.environ.update({name: value for name, value in addresses(root).items() if name not in os.environ})
    api = os.environ.get("PREFECT_API_URL") or PREFECT_API
    if not answers(api):
        say(f"No Prefect server answers at {api}: running plain `dvc repro`.")
        return _with_dvc(targets, force=force)
    os.environ["PREFECT_API_URL"] = api
    if "MLFLOW_TRACKING_URI" not in os.environ and answers(MLFLOW):
        os.environ["MLFLOW_TRACKING_URI"] = MLFLOW
    return _with_prefect(targets, force=force, say=say)


def _with_prefect(targets: Sequence[str], *, force: bool, say: Callable[[str], None]) -> int:
    import httpx

    from flows.pipeline import pipeline  # imports Prefect, which reads the environment set above

    try:
        state = pipeline(targets=list(targets) or None, force=force, return_state=True)
    except KeyboardInterrupt:  # before the first stage, or twice
        return STOPPED
    except httpx.TransportError as lost:  # the server is away for good: the run is what its stages have made of it
        told = told_by(Path.cwd(), os.getpid())
        if told is None:
            raise WorldError("the Prefect server", f"must answer, but {lost}", "start it and run again") from lost
        say(f"The Prefect server is away. The run ended so: {told['name']}. {told['message'] or ''}".strip())
        return 0 if told["type"] == "COMPLETED" else STOPPED if told["type"] == "CANCELLED" else 1
    if state.is_cancelled():
        return STOPPED
    return 0 if state.is_completed() else 1


def _with_dvc(targets: Sequence[str], *, force: bool) -> int:
    command = [sys.executable, "-m", "dvc", "repro", *(["--force"] if force else []), *targets]
    with stop_on_signal() as stop:
        # a session of its own: Ctrl+C reaches us alone, and we tell the stage
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        asked = set[int]()
        while process.poll() is None:
            if stop.is_set():
                ask_to_stop(process.pid, asked, begun=True)
            time.sleep(_POLL)
    if process.returncode == 0:
        return 0
    return STOPPED if stop.is_set() else 1
