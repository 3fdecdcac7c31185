"""`python -m flows.deployments`: what the Prefect UI can start, run in the current folder until told to end."""

import asyncio
import signal
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
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.runner import Runner
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from flows.pipeline import pipeline

NAME = "local"


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
        concurrency_limit=ConcurrencyLimitConfig(
            limit=1,  # two trainings would not fit one card; the second waits
            collision_strategy=ConcurrencyLimitStrategy.ENQUEUE,
        ),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    await _close_abandoned(deployment)
    await runner.start()


async def _close_abandoned(deployment: UUID) -> None:
    """Runs whose runner ended without a word, as in a power cut, would go on "running", and hold up those that wait."""
    live = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    async with get_client() as client:
        abandoned = await client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=live))),
        )
        for run in abandoned:
            message = "the program that ran it ended without a word; start it again, and training continues"
            await client.set_flow_run_state(run.id, Crashed(message=message), force=True)


def main() -> None:
    """Register the deployments with the server at PREFECT_API_URL, and run what is asked of them."""
    asyncio.run(_serve())


if __name__ == "__main__":
    main()
