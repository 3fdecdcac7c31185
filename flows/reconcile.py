"""What Prefect is told of flow runs whose process is gone: it does not notice by itself that one has died while it was away."""

import fcntl
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.life import FOLDER, read
from tasks.record import main_root

ABANDONED = "the program that ran it ended without a word; start it again, and training continues"

LIVE = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
"""States that somebody is expected to end."""

_SETTLE = 10.0  # seconds until what a flow run has sent last has reached the server's database


def reconcile(client: SyncPrefectClient, root: Path) -> int:
    """Tell the server of every flow run of this checkout whose process is gone; returns how many it had shown as running.

    Slots that they held are given back. A flow run that has ended is looked at once more, when what it sent has arrived: events
    of its task runs are lost while a server is away.
    """
    closed = 0
    for path in sorted((main_root(root) / FOLDER).glob("*.json")):
        with suppress(FileNotFoundError), path.open("r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            said = read(file)
            if "state" in said and time.time() - path.stat().st_mtime < _SETTLE:
                continue
            closed += _close(client, UUID(path.stem), said)
            path.unlink()
    return closed


def _close(client: SyncPrefectClient, run: UUID, said: dict[str, Any]) -> bool:
    """Returns whether it was shown as running."""
    for lease in said.get("leases", []):
        release(client, UUID(lease))
    try:
        state = client.read_flow_run(run).state
    except ObjectNotFound:
        return False  # deleted in the UI, or of another server
    wrong = state is not None and state.type in LIVE
    if wrong:
        client.set_flow_run_state(run, _state(said.get("state")), force=True)
    live = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=LIVE)))
    this = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    for task in client.read_task_runs(flow_run_filter=this, task_run_filter=live):
        if task.state is not None and task.state.name == "NotReady":
            continue  # what it needed failed: that is how such a one ends
        client.set_task_run_state(task.id, _state(said.get("stages", {}).get(task.name)), force=True)
    return wrong


def release(client: SyncPrefectClient, lease: UUID) -> None:
    """Give a slot back; one that has run out already is no error, and one that can't be given back now runs out."""
    with suppress(Exception):
        client.release_concurrency_slots_with_lease(lease)


def told(state: State[Any]) -> dict[str, str | None]:
    """A state as a flow run's file has it."""
    return {"type": state.type.value, "name": state.name, "message": state.message}


def _state(said: dict[str, Any] | None) -> State[Any]:
    if said is None or StateType(said["type"]) in LIVE:
        return Crashed(message=ABANDONED)
    return State(type=StateType(said["type"]), name=said["name"], message=said["message"])
