"""DVC's graph of stages, and one stage brought up to date, in a repository's root: DVC names stages as seen from there."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from flows.environment import LOGS
from flows.lines import Lines
from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import whole_file
from tasks.record import main_root

PATIENCE = 900.0
"""Seconds that a stage which was asked to stop may take to save, before it is killed."""

_BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")
_TORN = "Unable to read RWLock-file"
_BUSY_WAIT = 5.0  # seconds
_POLL = 0.1  # seconds
_LOG_LIMIT = 10_000_000  # bytes; a larger log makes room for a new one
_ADVICE = (  # dvc says this after every stage, to someone at a keyboard
    "To track the changes with git, run:",
    "git add ",
    "To enable auto staging, run:",
    "dvc config core.autostage true",
    "Use `dvc push` to send your updates",
)


class Outcome(StrEnum):
    """What became of a stage; the name of its state in Prefect."""

    EXECUTED = "Completed"
    CACHED = "Cached"  # nothing it depends on has changed
    RESTORED = "Restored"  # it ran with these inputs before: DVC's run cache had the outputs


class StageError(Exception):
    """A stage did not succeed.

    Args:
        reason: in the stage's own last words.
        crashed: it was killed, or broke down: it may succeed when run again. Otherwise a person has to put something
            right first.
    """

    def __init__(self, reason: str, *, crashed: bool) -> None:
        super().__init__(reason)
        self.crashed = crashed


class StoppedError(Exception):
    """A stage was asked to stop, and did, or is still saving."""


@dataclass(frozen=True)
class Stage:
    """A node of the graph."""

    name: str
    """As `dvc repro` takes it in the repository's root: train, or demo/dvc.yaml:corpus."""

    needs: tuple[str, ...]
    """Names of the stages whose outputs it reads."""

    metrics: tuple[Path, ...]
    """The files that dvc.yaml declares as its metrics."""


def short_name(stage: str) -> str:
    """The stage's name in its own dvc.yaml: corpus for demo/dvc.yaml:corpus, train for train@lora."""
    return stage.rpartition(":")[2].partition("@")[0]


def plan(targets: Sequence[str] = (), root: Path = Path()) -> list[Stage]:
    """The stages that `dvc repro TARGETS` would go through in `root`, each after all that it needs.

    Raises:
        InputError: there is no dvc.yaml there, it does not make a graph, or a target is not in it.
    """
    import networkx as nx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.reproduce import get_active_graph
    from dvc.utils import parse_target

    if not (root / "dvc.yaml").is_file():
        raise InputError("dvc.yaml", "is not in this folder", "run this in the repository's root")
    try:
        with Repo(str(root)) as repo:
            graph = get_active_graph(repo.index.graph)  # an edge goes from a stage to one it needs
            named = (parse_target(target) for target in targets or ["dvc.yaml"])
            wanted = {
                stage for file, name in named for stage in repo.stage.load_all(str(root / (file or "dvc.yaml")), name)
            }
            wanted |= {need for stage in wanted for need in nx.descendants(graph, stage)}
            return [
                Stage(
                    name=_name(stage, root),
                    needs=tuple(_name(need, root) for need in graph.successors(stage)),
                    metrics=tuple(Path(out.fs_path) for out in stage.outs if out.metric),
                )
                for stage in nx.dfs_postorder_nodes(graph)  # needs first, otherwise as written in dvc.yaml
                if stage in wanted
            ]
    except DvcException as error:
        value = " ".join(targets) or "dvc.yaml"
        rule = f"DVC cannot use it: {' '.join(str(error).split())}"
        raise InputError(value, rule, "correct it; `dvc stage list --all` names the stages there are") from error


def _name(stage: Any, root: Path) -> str:
    """DVC's name of a stage as seen from `root`; its own is as seen from the current folder."""
    file = os.path.relpath(stage.path, root)
    return stage.name if file == "dvc.yaml" else f"{file}:{stage.name}" if hasattr(stage, "name") else file


def stale(stages: Sequence[str]) -> dict[str, list[str]]:
    """Those of these stages that `dvc repro` would run, and what has changed of each.

    Outputs that are missing here are taken from DVC's cache first.

    Raises:
        InputError: DVC can't tell.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            with suppress(DvcException):  # an output that was changed by hand stays, and is told
                repo.checkout(targets=list(stages), allow_missing=True)
            found: dict[str, list[Any]] = repo.status(targets=list(stages))
    except DvcException as error:
        rule = f"DVC cannot tell what has changed: {' '.join(str(error).split())}"
        raise InputError(" ".join(stages), rule, "correct it") from error
    return {stage: sorted(_leaves(changes)) for stage, changes in found.items()}


def _leaves(changes: Any) -> Iterator[str]:
    """`params.yaml train.epochs modified` of DVC's nested status."""
    for change in changes if isinstance(changes, list) else [changes]:
        if isinstance(change, dict):
            for name, inner in change.items():
                prefix = "" if name in ("changed deps", "changed outs") else f"{name} "
                yield from (prefix + leaf for leaf in _leaves(inner))
        else:
            yield str(change)


def content(path: Path) -> str:
    """DVC's hash of what a file or folder holds now that some stage depends on.

    Raises:
        InputError: no stage depends on it, or it is not there.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with Repo() as repo:
        for dep in repo.index.deps:
            if Path(dep.fs_path) == path.absolute():
                try:
                    return str(dep.get_hash().value)
                except (DvcException, OSError) as error:
                    said = " ".join(str(error).split())
                    raise InputError(str(path), f"can't be read: {said}", "bring it, or name another") from error
    raise InputError(str(path), "no stage of dvc.yaml depends on it", "correct data.source")


def fetch(path: Path, log: Callable[[str], None]) -> None:
    """Bring the newest content of a file or folder that DVC tracks by a .dvc file: of an import from where it is from.

    Nothing is done for what no .dvc file tracks, nor for what was added here while no remote is configured.

    Raises:
        WorldError: DVC did not succeed.
    """
    from dvc.repo import Repo

    with Repo() as repo:
        [*trackers] = {
            out.stage
            for out in repo.index.outs
            if path.absolute().is_relative_to(out.fs_path) and out.stage.is_data_source
        }
        remote = repo.config["core"].get("remote")
    for stage in trackers:
        imported = stage.is_import
        if not imported and not remote:
            log(f"{stage.relpath}: no DVC remote is configured; taking {path} as it is")
            continue
        command = ["update" if imported else "pull", stage.relpath]
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "--wait-for-lock", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        for line in said:
            log(line)
        if done.returncode != 0:
            why = next((line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")), "it says nothing")
            remedy = "put that right, or run it without fetching"
            raise WorldError(f"dvc {' '.join(command)}", f"did not succeed: {why}", remedy)


def is_current(stage: str) -> bool:
    """Whether `dvc repro` would have nothing to do for the stage. Asked in this process, it takes tenths of a second.

    False also where that can't be said now: another dvc holds the lock, or DVC has something to complain of.
    """
    from dvc.repo import Repo, lock_repo

    with suppress(Exception), Repo() as repo, lock_repo(repo):
        (found,) = repo.stage.collect(stage)
        return not found.changed()
    return False


def reproduce(
    stage: str,
    log: Callable[[str], None],
    *,
    root: Path = Path(),
    needs: bool = False,
    force: bool = False,
    environment: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
    grace: float = PATIENCE,
) -> Outcome:
    """Bring one stage up to date.

    Another dvc that works on the same files is waited for.

    Args:
        stage: its name, from `plan`.
        log: is given each line that the stage and dvc print, as it is printed.
        root: the checkout it runs in.
        needs: bring up to date all that it needs, too; else that is so already.
        force: run it even if nothing has changed.
        environment: variables for the stage, beside this process's own.
        stop: when set, the stage is asked to save and stop.
        grace: seconds to wait for that. A stage that takes longer is left behind to finish saving, and killed after
            `PATIENCE`.

    Raises:
        StageError: it did not succeed.
        StoppedError: `stop` was set before it had succeeded.
    """
    stop = stop or threading.Event()
    waiting = False
    while not stop.is_set():
        attempt = _Attempt(stage, log, root, needs)
        code = attempt.run(force, environment or {}, stop, grace)
        if code == 0:
            return attempt.outcome
        if stop.is_set():
            raise StoppedError(attempt.last_words() or f"{stage}: stopped before it had begun")
        if attempt.torn:
            log(f"{stage}: a dvc was killed while it wrote its locks; they are made anew")
            mend_locks()
            continue
        if code < 0:
            with suppress(Exception):  # another dvc has the record: it will do
                mend_locks()
        if not attempt.busy:
            raise attempt.failure(code)
        if not waiting:
            log(f"{stage}: another dvc works on the same files; waiting for it to finish")
        waiting = True
        stop.wait(_BUSY_WAIT)
    raise StoppedError(f"{stage}: stopped before it had begun")


@dataclass
class _Attempt:
    """One `dvc repro`, and what its output tells."""

    stage: str
    log: Callable[[str], None]
    root: Path
    needs: bool
    outcome: Outcome = Outcome.EXECUTED
    started: bool = False
    words: deque[str] = field(default_factory=lambda: deque(maxlen=50))  # the stage's own
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=2))  # of them, or of its progress bar
    errors: list[str] = field(default_factory=list)  # dvc's

    def run(self, force: bool, environment: Mapping[str, str], stop: threading.Event, grace: float) -> int:
        """Returns dvc's exit code; raises StoppedError when `grace` is over."""
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *([] if self.needs else ["--single-item"])]
        command += [*(["--force"] if force else []), self.stage]
        # Prefect's context of this process, a control port among it, is not the stage's.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}
        # Output goes to a file: were it a pipe and this process killed, the stage would break at its next print,
        # perhaps while saving. A session of its own keeps Ctrl+C from reaching dvc, which is to outlive the stage.
        path = self.log_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LOG_LIMIT:
            path.replace(path.with_suffix(".log.1"))
        with path.open("ab") as sink, path.open("rb") as source:
            source.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env={**inherited, "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
            lines, asked = Lines(), set[int]()
            deadline = float("inf")
            try:
                while process.poll() is None:
                    self.read(lines, source.read())
                    if stop.is_set():
                        deadline = min(deadline, time.monotonic() + grace)
                        ask_to_stop(process.pid, asked, begun=self.started)
                    if time.monotonic() > deadline:
                        raise StoppedError(f"{self.stage}: was asked to stop and is still saving; see {path}")
                    time.sleep(_POLL)
            finally:
                if process.poll() is None:
                    ask_to_stop(process.pid, asked, begun=self.started)
                    _kill_later(process.pid)
                    threading.Thread(target=process.wait, daemon=True).start()  # an ended process still counts as there
            self.read(lines, source.read(), final=True)
            return process.returncode

    def log_file(self) -> Path:
        """In the main checkout; one of an experiment goes when that is saved."""
        main, name = main_root(self.root), re.sub(r"[/:]", "-", self.stage)
        own = "" if self.root.resolve() == main else f"{self.root.resolve().name}-"
        return main / LOGS / f"{own}{name}.log"

    def read(self, lines: Lines, data: bytes, *, final: bool = False) -> None:
        for line, progress in lines.feed(data, time.monotonic(), final=final):
            if progress:
                self.recent.append(line)
            elif line.startswith("> "):
                self.started = True
            elif line.startswith("ERROR: ") and (not self.started or "failed to reproduce" in line):
                self.errors.append(line.removeprefix("ERROR: "))
            elif self.started:
                self.words.append(line)
                self.recent.append(line)
            elif line.endswith("didn't change, skipping"):
                self.outcome = Outcome.CACHED
            elif "is cached - skipping run" in line:
                self.outcome = Outcome.RESTORED
            if not line.lstrip().startswith(_ADVICE):
                self.log(line)

    @property
    def busy(self) -> bool:
        return any(sign in error for sign in _BUSY for error in self.errors)

    @property
    def torn(self) -> bool:
        return any(_TORN in error for error in self.errors)

    def last_words(self) -> str:
        """The last thing the stage said in its own name, to the end: `train: ...`; else its last line."""
        words = list(self.words)
        speaks = [index for index, line in enumerate(words) if line.startswith(f"{short_name(self.stage)}: ")]
        return "\n".join(words[speaks[-1] :] if speaks else words[-1:])

    def failure(self, dvc_code: int) -> StageError:
        error = " ".join(self.errors)
        ended = re.search(r"exited with (-?\d+)$", error)
        if ended is None and dvc_code > 0:  # dvc refused: a missing file, a faulty dvc.yaml
            return StageError(f"{self.stage}: {error or f'dvc ended with exit code {dvc_code}'}", crashed=False)
        code = int(ended[1]) if ended is not None else dvc_code
        code = code if code >= 0 else 128 - code  # as a shell counts signals
        if code == 1:
            return StageError(self.last_words() or f"{self.stage}: exited with code 1", crashed=False)
        how, said = f"exited with code {code}", list(self.recent)
        with suppress(ValueError):
            killer = signal.Signals(code - 128)
            how += f", {killer.name}"
            if said and (signal.strsignal(killer) or killer.name) in said[-1]:
                said.pop()  # the shell's word for it ("Killed"), not the stage's
        last = f", last saying {said[-1].strip()!r}" if said else ""
        return StageError(f"{self.stage}: {how}{last}; its output is in {self.log_file()}", crashed=True)


def mend_locks() -> None:
    """Take what the dead have left out of DVC's record of who reads and writes what.

    A dvc that was killed stays in it until another wants the same file, and then blocks it if its number is some other
    process's by now. One that was killed while it wrote leaves half a record, which stops everyone.
    """
    from dvc.lock import make_lock
    from dvc.repo import Repo

    with Repo() as repo:
        record = Path(repo.tmp_dir) / "rwlock"
        hardlink = repo.config["core"].get("hardlink_lock", False)
        with make_lock(f"{record}.lock", tmp_dir=repo.tmp_dir, hardlink_lock=hardlink):  # nobody is writing it
            try:
                held = json.loads(record.read_text(encoding="utf-8"))
            except FileNotFoundError:
                return
            except ValueError:
                record.unlink()
                return
            reads = {path: [x for x in who if psutil.pid_exists(x["pid"])] for path, who in held["read"].items()}
            writes = {path: who for path, who in held["write"].items() if who and psutil.pid_exists(who["pid"])}
            left = {"read": {path: who for path, who in reads.items() if who}, "write": writes}
            if left != held:
                with whole_file(record) as temporary:
                    temporary.write_text(json.dumps(left), encoding="utf-8")


def ask_to_stop(dvc: int, asked: set[int], *, begun: bool) -> None:
    """Ask the stage that a dvc process runs to save and stop; call it repeatedly until dvc has ended.

    SIGTERM goes to the stage itself: dvc sees its command fail, and releases its locks. Told to dvc instead, dvc would
    die at once with the stage still running; and SIGINT is ignored by whatever was started in the background.

    Args:
        dvc: id of the dvc process.
        asked: ids of the processes that were asked, and of those above them: none is asked again. This call adds to it.
        begun: dvc has started the stage's command. Before that there is nothing to save, and dvc itself is ended.
    """
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(dvc)
        stages = [process for process in parent.children(recursive=True) if _is_stage(process)]
        ours = {process.pid for process in stages}
        # The workers of a stage, forked from it, look like it: only the first of a family is told, it tells the others.
        heads = [process for process in stages if process.ppid() not in ours]
        for process in (heads or parent.children()) if begun else [parent]:
            if process.pid not in asked:
                # a shell between dvc and the stage lives a moment longer: it is to end with the stage's exit code
                asked.update(one.pid for one in (process, *process.parents()))
                process.terminate()


def _is_stage(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return any(flag == "-m" and module.startswith(("tasks.", "demo.")) for flag, module in itertools.pairwise(words))


def _kill_later(group: int) -> None:
    """Leave a process behind that ends the process group `group` after `PATIENCE` seconds, if it is still there.

    Prefect kills a cancelled flow after 30 s; a large checkpoint may take longer to write.
    """
    watchdog = (
        "import os, signal, time\n"
        f"for _ in range({int(PATIENCE)}):\n"
        "    time.sleep(1)\n"
        "    try:\n"
        f"        os.killpg({group}, 0)\n"
        "    except OSError:\n"
        "        raise SystemExit\n"
        f"os.killpg({group}, signal.SIGKILL)\n"
    )
    subprocess.Popen(
        [sys.executable, "-c", watchdog],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
