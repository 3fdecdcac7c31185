"""`python -m flows.deployments`: what the Prefect UI can start, run in the current folder until told to end."""

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.runner.storage import LocalStorage
from prefect.schedules import Cron
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from flows import form, slots
from flows.environment import RETRAIN_CRON
from flows.life import FOLDER
from flows.pipeline import evaluate_only, pipeline
from flows.promote import promote
from flows.reconcile import ABANDONED, LIVE, reconcile
from flows.retrain import retrain
from flows.sweep import sweep
from rwkv_core.errors import InputError
from tasks.record import main_root

NAME = "local"
"""Under which `rwkvflow up` serves them; in a work pool they have the pool's name."""

_RECONCILE = 15.0  # seconds


class _Deployment(NamedTuple):
    flow: Flow[..., Any]
    description: str
    settings: Mapping[str, str] | None = None
    """What of params.yaml its form shows, if it has such a part."""


def _all() -> list[_Deployment]:
    """What is offered, by the flows' own names."""
    return [
        _Deployment(pipeline, "Train, judge and export a model: the DVC pipeline.", form.TRAINING),
        _Deployment(retrain, "The pipeline, if the data is other than it was the last time."),
        _Deployment(evaluate_only, "Judge the model there is; nothing is trained.", form.EVALUATION),
        _Deployment(sweep, "Try many values, each as a DVC experiment."),
        _Deployment(
            promote, "Judge a registered model; if it is better than its base and the champion, it is the champion."
        ),
    ]


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


async def _serve(root: Path) -> None:
    runner = _Runner(pause_on_shutdown=False)
    signal.signal(signal.SIGINT, runner.handle_sigterm)
    for offered in _all():
        deployment = await runner.aadd_deployment(await _deployment(offered, NAME, os.environ.get(RETRAIN_CRON)))
        await _give_form(deployment, offered, root)
        await _close_abandoned(deployment)
    with get_client(sync_client=True) as client:
        slots.create(client)
    reconciling = asyncio.create_task(_reconcile())
    try:
        await runner.start()  # only now does it ask for work: `rwkvflow up` takes that as a sign that all are there
    finally:
        reconciling.cancel()


async def _deployment(offered: _Deployment, name: str, retrain_cron: str | None) -> RunnerDeployment:
    """As `name`.

    Raises:
        InputError: the cron is not valid.
    """
    try:
        schedules = [Cron(retrain_cron)] if retrain_cron and offered.flow is retrain else None
    except ValueError:
        remedy = "write five fields: '0 3 * * *' is each night at three"
        raise InputError(f"--retrain-cron {retrain_cron!r}", "is not a cron expression", remedy) from None
    return await offered.flow.ato_deployment(
        name=name,
        description=offered.description,
        schedules=schedules,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


async def _give_form(deployment: UUID, offered: _Deployment, root: Path) -> None:
    """What its UI asks for, in the place of what Prefect reads from the function alone."""
    schema = form.parameters(offered.flow.parameters.model_dump(exclude_unset=True), root, offered.settings)
    async with get_client() as client:
        await client.update_deployment(deployment, DeploymentUpdate(parameter_openapi_schema=schema))


async def register(root: Path, pool: str, folder: str, retrain_cron: str | None) -> list[str]:
    """Offer the deployments through a work pool of the server at PREFECT_API_URL, for its workers to run.

    Args:
        root: this checkout, whose params.yaml and models/ the forms show.
        pool: the work pool, which must be there.
        folder: where a checkout is for the workers: on their machine, or in their image.
        retrain_cron: when to retrain; None leaves the schedule as it is.

    Returns:
        The names of the deployments.

    Raises:
        InputError: there is no such pool, or the cron is not valid.
    """
    async with get_client() as client:
        try:
            await client.read_work_pool(pool)
        except ObjectNotFound:
            remedy = "make it: prefect work-pool create --type process --base-job-template deploy/process.json"
            raise InputError(f"--pool {pool}", "the server has no such work pool", f"{remedy} {pool}") from None
    names = []
    for offered in _all():
        deployment = await _deployment(offered, pool, retrain_cron)
        deployment.work_pool_name, deployment.storage = pool, LocalStorage(folder)
        await _give_form(await deployment.aapply(), offered, root)
        names.append(deployment.full_name)
    return names


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
    asyncio.run(_serve(Path.cwd()))


if __name__ == "__main__":
    main()
