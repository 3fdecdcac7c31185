"""`python -m flows.deployments`: what the Prefect UI can start, run in the current folder until told to end."""

import asyncio
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.runner import Runner
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from flows import slots
from flows.life import FOLDER
from flows.pipeline import pipeline
from flows.reconcile import ABANDONED, LIVE, reconcile
from tasks.record import main_root

NAME = "local"
_RECONCILE = 15.0  # seconds


class _Runner(Runner):
    """Ends as Prefect's own is meant to: it cancels what runs, waits until that has saved, and then goes.

    Prefect 3.8.8 forgets to await its own stop in a signal handler, and kills the runs at once.
    """

    def handle_sigterm(self, *_: Any, **__: Any) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(lambda: loop.create_task(self._end()))

    async def _end(self) -> None:
        if self.started:
            await self.astop()


async def _serve() -> None:
    runner = _Runner(pause_on_shutdown=False)
    signal.signal(signal.SIGINT, runner.handle_sigterm)
    deployment = await runner.aadd_flow(
        pipeline,
        name=NAME,
        description="The DVC pipeline of this checkout.",
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    await _close_abandoned(deployment)
    with get_client(sync_client=True) as client:
        slots.create(client)
    reconciling = asyncio.create_task(_reconcile())
    try:
        await runner.start()
    finally:
        reconciling.cancel()


async def _close_abandoned(deployment: UUID) -> None:
    """Runs whose process never came to be, for the runner ended just then, would go on "pending"."""
    root = main_root(Path.cwd())
    async with get_client() as client:
        found = await client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=LIVE))),
        )
        for run in found:
            if not (root / FOLDER / f"{run.id}.json").exists():  # else `reconcile` knows whether it lives
                await client.set_flow_run_state(run.id, Crashed(message=ABANDONED), force=True)


async def _reconcile() -> None:
    """Close, now and then, flow runs whose process has died: of this runner's, of one before it, and those started by hand."""
    while True:
        with suppress(Exception):  # the server is away: next time
            await asyncio.to_thread(_reconcile_once)
        await asyncio.sleep(_RECONCILE)


def _reconcile_once() -> None:
    with get_client(sync_client=True) as client:
        reconcile(client, Path.cwd())


def main() -> None:
    """Register the deployments with the server at PREFECT_API_URL, and run what is asked of them."""
    asyncio.run(_serve())


if __name__ == "__main__":
    main()
