"""The sign that a flow run's process lives: a file, locked as long as it does.

The operating system unlocks it however the process ends. Stages that run for it look at the lock, and so does what tells
Prefect of runs that ended without a word (flows/reconcile.py). What the file says is what Prefect should be told, if the
process could not tell it itself.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tasks.record import main_root
from tasks.stage import answers

FOLDER = Path(".rwkvflow/flows")
"""One file a flow run, below the main checkout: <id>.json."""

PATIENCE = 300.0
"""Seconds that a flow run which is done waits for a server that is away, to tell it how it ended."""

_POLL = 1.0  # seconds

_kept: list["Life"] = []  # a lock lasts until the process ends: the flow's last state is sent after the flow's own code


class Life:
    """The file of a flow run, whose process this is.

    Args:
        root: the checkout.
        flow_run: its id.
        served: a runner has started it, not a person.
    """

    def __init__(self, root: Path, flow_run: str, *, served: bool) -> None:
        self.path = main_root(root) / FOLDER / f"{flow_run}.json"
        self._file = _locked(self.path)
        self._told: dict[str, Any] = {"leases": []}
        self._writing = threading.RLock()
        self.note(pid=os.getpid(), served=served)
        _kept.append(self)

    def note(self, **told: Any) -> None:
        """Put something into the file.

        Args:
            told: ended, that its stages need no watching any more; state and stages, how the flow run and its task runs ended:
                type, name, message of each.
        """
        with self._writing:
            self._told |= told
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(self._told))
            self._file.flush()

    @contextmanager
    def holding(self, lease: str) -> Iterator[None]:
        """In the block the file names the lease of slots, among those that other threads hold."""
        with self._writing:
            self.note(leases=[*self._told["leases"], lease])
        try:
            yield
        finally:
            with self._writing:
                self.note(leases=[held for held in self._told["leases"] if held != lease])

    def await_server(self, api: str, say: Callable[[str], None]) -> None:
        """Wait for a server that is away, for at most `PATIENCE`: only the flow's process can end its run in all details."""
        deadline, said = time.monotonic() + PATIENCE, False
        while not answers(api) and time.monotonic() < deadline:
            if not said:
                say(f"the Prefect server at {api} is away; waiting for it, to tell how this ended")
                said = True
            time.sleep(_POLL)


def read(file: IO[str]) -> dict[str, Any]:
    """What a file says; nothing, if its process was killed while it wrote."""
    file.seek(0)
    try:
        found = json.load(file)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def living(root: Path) -> Iterator[dict[str, Any]]:
    """What the files of flow runs say whose processes live."""
    for path in sorted((main_root(root) / FOLDER).glob("*.json")):
        with suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield read(file)


def told_by(root: Path, pid: int) -> dict[str, Any] | None:
    """How the flow run of a living process ended, as it has noted; None if it has not."""
    return next((told.get("state") for told in living(root) if told.get("pid") == pid), None)


def _locked(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+", encoding="utf-8")
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:  # not one that was removed meanwhile
                return file
        file.close()
