"""GPU slots: one training to a card, however many flow runs there are.

A slot is a global concurrency limit of the Prefect server, gpu-0, gpu-1, ..., shown there under Concurrency. A machine without
a card has one too: two trainings would not fit into its memory together, or would take twice as long each.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.client.schemas.responses import ConcurrencyLimitWithLeaseResponse, GlobalConcurrencyLimitResponse

from flows.graph import StoppedError
from flows.life import Life
from flows.reconcile import release
from rwkv_core.errors import Problem
from tasks import params

STAGES = ("train", "evaluate", "pretrain")
"""The stages that compute on a card."""

_PREFIX = "gpu-"
_LEASE = 300.0  # seconds that a slot stays taken by a flow run of which nothing is heard
_RENEW = 30.0
_ASK = 2.0
_LOCKED = 423  # the status of a limit that has no slot left


def cards() -> int:
    """How many this process may use; 0 where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except Exception:  # no library, no driver
        return 0


def wanted(stage: str) -> int | None:
    """How many cards a stage takes in this checkout; None: all that there are."""
    with suppress(Problem):
        parallel = params.load().train.parallel
        if stage == "train" and parallel.strategy != "one_device":
            return parallel.devices
    return 1


def create(client: SyncPrefectClient) -> None:
    """Make the limits of this machine's cards, where the server lacks them. What a person has changed there stays."""
    known = {limit.name for limit in client.read_global_concurrency_limits(limit=200)}
    for name in [f"{_PREFIX}{card}" for card in range(max(cards(), 1))]:
        if name not in known:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))


@contextmanager
def slot(
    stage: str, count: int | None, life: Life, stop: threading.Event, say: Callable[[str], None]
) -> Iterator[dict[str, str]]:
    """Wait for a slot, or several at once, and hold them in the block.

    A server that has no slots, or is away, is not waited for.

    Args:
        stage: what it is for, in words.
        count: how many; None: all.
        life: of the flow run, through which they are given back for a process that was killed.
        stop: ends the waiting.
        say: is told what is waited for.

    Yields:
        Variables for the stage: which cards it has, where there are several.

    Raises:
        StoppedError: `stop` was set before there was a slot.
    """
    taken = _take(stage, count, life, stop, say)
    if taken is None:
        yield {}
        return
    names, lease = taken
    over = threading.Event()
    with life.holding(str(lease)):
        threading.Thread(target=_keep, args=(lease, over), name="gpu slot", daemon=True).start()
        try:
            yield _variables(names)
        finally:
            over.set()
            with suppress(Exception), get_client(sync_client=True) as client:
                release(client, lease)


def _take(
    stage: str, count: int | None, life: Life, stop: threading.Event, say: Callable[[str], None]
) -> tuple[list[str], UUID] | None:
    said = False
    while not stop.is_set():
        try:
            with get_client(sync_client=True) as client:
                limits = _limits(client)
                if not limits:
                    return None
                free = [limit.name for limit in limits if limit.active_slots < limit.limit]
                names = free[: min(count or len(limits), len(limits))]
                lease = _lease(client, names, life) if len(names) >= min(count or len(limits), len(limits)) else None
        except Exception as error:  # training does not depend on a server
            say(f"{stage}: begins without a GPU slot, which the Prefect server does not give ({type(error).__name__})")
            return None
        if lease is not None:
            if said:
                say(f"{stage}: has {' and '.join(names)} now")
            return names, lease
        if not said:
            busy = ", ".join(limit.name for limit in limits if limit.name not in free)
            say(f"{stage}: waiting for a GPU slot; other runs have {busy or 'what was free'}")
            said = True
        stop.wait(_ASK)
    raise StoppedError(f"{stage}: stopped while it waited for a GPU slot")


def _limits(client: SyncPrefectClient) -> list[GlobalConcurrencyLimitResponse]:
    """The slots that are in force, in the order of the cards."""
    found = [limit for limit in client.read_global_concurrency_limits(limit=200) if limit.active]
    ours = [limit for limit in found if re.fullmatch(f"{_PREFIX}[0-9]+", limit.name)]
    return sorted(ours, key=lambda limit: _card(limit.name))


def _card(name: str) -> int:
    return int(name.removeprefix(_PREFIX))


def _lease(client: SyncPrefectClient, names: list[str], life: Life) -> UUID | None:
    """Take all of them, or none."""
    holder = ConcurrencyLeaseHolder(type="flow_run", id=UUID(life.path.stem))
    try:
        reply = client.increment_concurrency_slots_with_lease(names, 1, "concurrency", _LEASE, holder)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == _LOCKED:  # another was faster
            return None
        raise
    return ConcurrencyLimitWithLeaseResponse.model_validate(reply.json()).lease_id


def _keep(lease: UUID, over: threading.Event) -> None:
    """Renew the lease until the stage is over. It outlives a server that is away for less than `_LEASE`."""
    while not over.wait(_RENEW):
        with suppress(Exception), get_client(sync_client=True) as client:
            client.renew_concurrency_lease(lease, _LEASE)


def _variables(names: list[str]) -> dict[str, str]:
    """Those cards of several. What CUDA_VISIBLE_DEVICES has may be UUIDs."""
    there = cards()
    if there < 2 or any(_card(name) >= there for name in names):
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else [str(card) for card in range(there)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(known[_card(name)].strip() for name in names)}
