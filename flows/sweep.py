"""A sweep as a Prefect flow: a task for each arm, the table and the chart as artifacts."""

import base64
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State as FlowState
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows import arms, form, graph, reconcile, slots
from flows.arms import Sweep, Told
from flows.life import Life
from flows.pareto import publish
from rwkv_core.errors import Problem
from tasks.stage import LIFE, NESTED

_WATCH = 2.0  # seconds between two looks whether a flow run was cancelled


@task(name="arm", cache_policy=NO_CACHE, persist_result=False)
def _arm(job: arms.Job, life: Life) -> FlowState[object]:
    log = get_run_logger().info
    card = partial(slots.slot, job.arm.name, 1, life, job.stop, log) if slots.cards() else nullcontext
    try:
        failure = job.run(log, card)
    except graph.StoppedError as stopped:
        return Cancelled(message=str(stopped))
    return Failed(message=failure) if failure else Completed(message=job.arm.name)


@flow(name="sweep", task_runner=ThreadPoolTaskRunner(), persist_result=False)  # type: ignore[arg-type]
def sweep(space: Sweep) -> FlowState[object]:
    """Try many values, each as a DVC experiment; the same sweep again does what is missing.

    Args:
        space: Which values to try, and how.
    """
    life = Life(Path.cwd(), str(runtime.flow_run.id), served=runtime.deployment.id is not None)
    try:
        end = _sweep(space, life)
    except BaseException:  # all arms have ended, and the runner knows why
        life.note(ended=True)
        raise
    life.note(ended=True, state=reconcile.told(end))
    return end


def _sweep(space: Sweep, life: Life) -> FlowState[object]:
    root, stop = Path.cwd(), threading.Event()
    log = get_run_logger().info
    inherited = {
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        NESTED: str(runtime.flow_run.id),
        LIFE: str(life.path),
    }

    futures = []

    def start(job: arms.Job) -> None:
        futures.append(_arm.with_options(task_run_name=f"{job.arm.name} {job.halt or 'to the end'}").submit(job, life))

    try:
        if runtime.deployment.id is not None:  # it comes of a form
            _confine(space, root)
        with arms.State(root, space, inherited) as state:
            told = arms.run(state, start, log, _Watch(watch=runtime.deployment.id is None), stop)
            table, chart = publish(root, state, told)
    except (KeyboardInterrupt, TerminationSignal):
        stop.set()
        for future in futures:
            future.wait()
        if runtime.deployment.id is not None:
            raise  # the runner sent the signal, and records how the run ended
        return Cancelled(message="stopped by a signal; what ran has saved its work")
    except (arms.Stopped, graph.StoppedError) as stopped:
        return Cancelled(message=str(stopped))
    except (Problem, graph.StageError) as problem:
        return Failed(message=str(problem))
    create_markdown_artifact(table.read_text(encoding="utf-8"), key="sweep-table", description=f"Sweep {space.name}")
    picture = base64.b64encode(chart.read_bytes()).decode()  # a browser cannot open a file of this machine
    create_markdown_artifact(
        f"![loss against what it takes](data:image/png;base64,{picture})",
        key="sweep-pareto",
        description=f"Sweep {space.name}: loss against what it takes",
    )
    return _conclusion(told)


def _confine(space: Sweep, root: Path) -> None:
    for name, values in space.grid.items():
        for value in values:
            form.confined(name, value, root)
    for name, drawn in (space.random.space if space.random else {}).items():
        for value in drawn.choices or ():
            form.confined(name, value, root)
    for name, value in space.fixed.items():
        form.confined(name, value, root)


class _Watch:
    """Whether a flow run is to be cancelled: one that a person started has no runner to tell it."""

    def __init__(self, *, watch: bool) -> None:
        self._watch, self._looked = watch, 0.0

    def __call__(self) -> bool:
        if not self._watch or time.monotonic() < self._looked + _WATCH:
            return False
        self._looked = time.monotonic()
        with suppress(Exception), get_client(sync_client=True) as client:  # a server may be away for a moment
            state = client.read_flow_run(runtime.flow_run.id).state
            return state is not None and (state.is_cancelling() or state.is_cancelled())
        return False


def _conclusion(told: Sequence[Told]) -> FlowState[object]:
    failed = [t for t in told if t.failed]
    if len(failed) == len(told):
        return Failed(message=f"all {len(told)} arms failed, the first so: {failed[0].failed}")
    best = told[0].result
    loss = f"the best has a held-out loss of {best.loss:.4f}" if best else ""
    return Completed(message=f"{len(told)} arms, {len(failed)} of them failed; {loss}")
