"""How a stage is run: `python -m tasks.<stage>` is what dvc.yaml calls, and it finds out where it is.

nested  the pipeline flow runs it inside a task run of its own: the function is called, its output is that task's log.
served  PREFECT_API_URL names a server that answers: a flow of one task, visible in that server's UI.
plain   otherwise: the function is called. Prefect is not even imported, let alone a server started.
"""

import fcntl
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn

from rwkv_core.errors import Interrupted, Problem
from rwkv_core.files import explain
from rwkv_core.processes import is_first, stop_with_first, stop_with_parent

OUTPUTS = Path("outputs")
"""Everything the stages write, each into its own folder, as dvc.yaml declares it."""

DATA, PREVIEW, TRAIN, MERGED, EVALUATE, EXPORT = (
    OUTPUTS / n for n in ("data", "preview", "train", "merged", "evaluate", "export")
)
MANIFEST = DATA / "manifest.json"
ADAPTER = TRAIN / "adapter.pth"
MODEL = MERGED / "model.pth"
STATE = MERGED / "state.pth"
"""What clients mount beside it, if a state was tuned."""
WHOLE_STATE = MERGED / "state.rwkv-flow.pth"
"""The same with its token shift, if that was tuned too."""

NESTED = "RWKVFLOW_FLOW_RUN"
"""Environment variable that the pipeline flow sets to its own id: the stage is nested in it."""

LAUNCH = "RWKVFLOW_LAUNCH"
"""Environment variable: what starts the processes of a training on all machines, `srun python` or `torchrun --nnodes 2 ...`."""

LIFE = "RWKVFLOW_LIFE"
"""Environment variable that names the file which that flow run has locked while its process lives; see flows/life.py."""

Stage = Callable[[], None]

_EX_SOFTWARE = 70  # sysexits.h
_FIRST_SPEAKS = 5.0  # seconds
_LOOK = 1.0  # seconds


def mounted(root: Path = Path()) -> Path | None:
    """The state that belongs to the merged model of a checkout, with all that there is of it."""
    return next((root / path for path in (WHOLE_STATE, STATE) if (root / path).exists()), None)


def main(stage: Stage) -> NoReturn:
    """Run the stage, and exit.

    The code is 0 when it is done, 1 for a problem that a person has to put right, 70 for any other failure, which may not be
    there the next time (a device that broke down, a defect of ours), and 128 + n when signal n stopped it.
    """
    if not is_first():
        _beside(stage)
    name = stage.__name__
    stop_with_parent()
    _stop_with_flow()
    _tell_choices()
    try:
        if NESTED not in os.environ and answers(os.environ.get("PREFECT_API_URL", "")):
            _served(stage)
        else:
            stage()
    except Problem as problem:
        print(f"{name}: {problem}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as stop:
        print(f"{name}: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print(f"{name}: stopped before there was anything to save", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        explained = explain(error, Path(error.filename or OUTPUTS))
        if explained is error:
            _crash()
        print(f"{name}: {explained}", file=sys.stderr)
        sys.exit(1)
    except Exception:
        _crash()
    sys.exit(0)


def launch(module: str) -> None:
    """Become what `LAUNCH` says, with `-m module` behind it; return if it says nothing.

    This process is replaced: dvc waits for the launcher, and what stops this stage stops that. But srun kills its processes
    when it is told to stop: this process waits for it, and has it pass SIGUSR1 on to them instead.
    """
    words = shlex.split(os.environ.pop(LAUNCH, ""))
    if not words:
        return
    stop_with_parent()
    command = [*words, "-m", module]
    try:
        if Path(words[0]).name != "srun":
            os.execvp(words[0], command)
        # in a session of its own, so that Ctrl+C and a terminal that goes away come through this process
        srun = subprocess.Popen(command, start_new_session=True, preexec_fn=stop_with_parent)
    except OSError as error:
        print(f"{LAUNCH} = {words[0]}: can't be started ({error.strerror}); correct it", file=sys.stderr)
        sys.exit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: srun.send_signal(signal.SIGUSR1))
    code = srun.wait()
    sys.exit(code if code >= 0 else 128 - code)


def _stop_with_flow() -> None:
    """Be told to stop when the flow run's process dies without a word. dvc, the parent, lives on: it sees the stage fail, and
    releases its locks.
    """
    name = os.environ.get(LIFE)
    if name is not None:
        threading.Thread(target=_watch, args=(Path(name),), name="flow run", daemon=True).start()


def _watch(life: Path) -> None:
    with suppress(FileNotFoundError), life.open(encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOOK)
                continue
            if '"ended": true' not in file.read():  # else the flow run knows that this stage is still saving
                os.kill(os.getpid(), signal.SIGTERM)
            return


def _beside(stage: Stage) -> NoReturn:
    """Run the stage as one of the processes of a training that are not the first: in silence, as that one speaks for all.

    What stops the first one stops this one too. It ends with 0 then: who started it would end the first with any other code,
    perhaps before that had said why.
    """
    stop_with_first()
    errors = sys.stderr
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            stage()
        except (Interrupted, KeyboardInterrupt):
            pass
        except BaseException:
            time.sleep(_FIRST_SPEAKS)  # most likely the first has failed of the same, or has gone
            traceback.print_exc(file=errors)
            os._exit(_EX_SOFTWARE)  # not through the exits of libraries that wait for the other processes
    sys.exit(0)


def _tell_choices() -> None:
    """Print which implementation of each operator runs, once each."""
    log = logging.getLogger("kernels")
    handler = logging.Handler()
    handler.emit = lambda record: print(record.getMessage(), flush=True)  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _crash() -> NoReturn:
    traceback.print_exc()
    sys.exit(_EX_SOFTWARE)


def _served(stage: Stage) -> None:
    from prefect import flow, task

    @flow(name="stage", flow_run_name=stage.__name__, log_prints=True)
    def stage_flow() -> None:
        task(name=stage.__name__)(stage)()

    stage_flow()


def answers(url: str) -> bool:
    """Whether a server says at `url`/health that it is well."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False
