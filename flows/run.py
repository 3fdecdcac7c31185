"""`rwkvflow run` and `rwkvflow sweep`: flows where a Prefect server answers, plain DVC where none does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    if not reach(root):
        say(f"No Prefect server answers at {_api()}: running plain `dvc repro`.")
        return _with_dvc(targets, force=force)
    return _with_prefect(targets, force=force, say=say)


def sweep(root: Path, file: Path, slots: int | None, say: Callable[[str], None]) -> int:
    """Run the sweep in a file: shown in Prefect where a server answers.

    Returns:
        0 done, 1 all arms failed or what they need can't be made, 130 stopped.

    Raises:
        InputError: the file or a value is not valid.
    """
    from flows import arms, graph

    served = reach(root)
    space = arms.read(file)
    if slots is not None:
        space = space.model_copy(update={"slots": slots})
    if served:
        from flows.sweep import sweep as flow  # imports Prefect, which reads the environment set above

        ended = flow(space, return_state=True)
        if ended.is_cancelled():
            return STOPPED
        say(ended.message or "")
        return 0 if ended.is_completed() else 1
    from flows.pareto import publish

    say(f"No Prefect server answers at {_api()}: the arms run without.")
    with stop_on_signal() as asked, arms.State(root, space) as state, ThreadPoolExecutor(space.slots) as executor:
        try:
            told = arms.run(state, arms.beside(executor, say), say, asked.is_set, asked)
        except (arms.Stopped, graph.StoppedError) as stopped:
            say(str(stopped))
            return STOPPED
        except graph.StageError as failure:
            say(str(failure))
            return 1
        table, chart = publish(root, state, told)
    say(table.read_text(encoding="utf-8"))
    say(f"{table}\n{chart}")
    return 1 if all(t.failed for t in told) else 0


def reach(root: Path) -> bool:
    """Set the environment for Prefect's server and MLflow's, if they answer; whether Prefect's does. Before either's import."""
    set_defaults(root)
    if not os.environ.get("PREFECT_API_URL"):  # a server that a person names has its own password, if any
        os.environ.update({name: value for name, value in addresses(root).items() if name not in os.environ})
    if not answers(_api()):
        return False
    os.environ["PREFECT_API_URL"] = _api()
    if "MLFLOW_TRACKING_URI" not in os.environ and answers(MLFLOW):
        os.environ["MLFLOW_TRACKING_URI"] = MLFLOW
    return True


def _api() -> str:
    return os.environ.get("PREFECT_API_URL") or PREFECT_API


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
