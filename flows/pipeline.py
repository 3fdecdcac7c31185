"""The pipeline as a Prefect flow: DVC says what to run and in which order, Prefect shows it, retries it, stops it."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, chdir, contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import Task, flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import Pause, TerminationSignal
from prefect.futures import PrefectConcurrentFuture
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows import experiment as experiments
from flows import form, graph, reconcile, report, slots
from flows.life import Life
from flows.progress import Progress
from rwkv_core.errors import Problem
from tasks.stage import LIFE, NESTED, answers

RUN_NAME = "RWKVFLOW_FLOW_RUN_NAME"
"""Environment variable that tells a stage the name, beside the id, of the flow run it belongs to."""

RESUMES = "train"
"""The stage that continues from its last checkpoint; the others are cheap to start again by hand."""

JUDGES = "evaluate"
"""The stage that `evaluate-only` is for."""

RETRY_DELAY = 2.0
"""Seconds between a crash and the next try."""

RUNNER_GRACE = 25.0
"""Seconds in which a cancelled run of a deployment has to end: Prefect kills it after 30."""

ONE_AT_A_TIME: Any = ThreadPoolTaskRunner(max_workers=1)
"""As `dvc repro`: two stages may not fit into memory together."""

_CANCEL_POLL = 2.0  # seconds
_Future = PrefectConcurrentFuture[State[object]]


def _worth_a_retry(_task: Task[..., object], task_run: TaskRun, state: State[object]) -> bool:
    """A crash of a stage that continues where it was. What a person has to put right stays wrong when tried again."""
    failure = state.data
    return graph.short_name(task_run.name) == RESUMES and isinstance(failure, graph.StageError) and failure.crashed


@task(
    cache_policy=NO_CACHE,  # DVC knows whether there is anything to do
    persist_result=False,
    retry_delay_seconds=RETRY_DELAY,
    retry_condition_fn=_worth_a_retry,
)
def reproduce(stage: str, force: bool, stop: threading.Event, grace: float, life: Life) -> State[object]:
    """Bring one stage up to date; the state it ends in says how."""
    environment = {
        NESTED: str(runtime.flow_run.id),
        RUN_NAME: str(runtime.flow_run.name),
        LIFE: str(life.path),
        "PREFECT_LOGGING_TO_API_ENABLED": "false",  # this task logs what the stage prints: else each line came twice
    }
    log, name = get_run_logger().info, graph.short_name(stage)
    try:
        if not force and graph.is_current(stage):
            log(f"{stage}: nothing that it depends on has changed")
            return Completed(name=graph.Outcome.CACHED.value)
        with ExitStack() as around:
            if name in slots.STAGES:
                environment |= around.enter_context(slots.slot(stage, slots.wanted(name), life, stop, log))
            read = None
            if name == RESUMES:
                read = around.enter_context(Progress(Path.cwd(), UUID(environment[NESTED]), UUID(runtime.task_run.id)))

            def tell(line: str) -> None:
                log(line)
                if read is not None:
                    read.read(line)

            outcome = graph.reproduce(stage, tell, force=force, environment=environment, stop=stop, grace=grace)
    except graph.StageError as failure:
        return Failed(message=str(failure), data=failure)
    except graph.StoppedError as stopped:
        return Cancelled(message=str(stopped))
    return Completed(name=outcome.value)


@flow(name="pipeline", task_runner=ONE_AT_A_TIME, persist_result=False)
def pipeline(
    settings: dict[str, Any] | None = None, targets: list[str] | None = None, force: bool = False, retries: int = 1
) -> State[object]:
    """Bring every stage up to date, in the order of DVC's graph.

    Args:
        settings: Settings otherwise than in params.yaml, by dotted names; the run is then a DVC experiment.
        targets: Stages to bring up to date, with all that they need. Empty: the whole pipeline.
        force: Run the stages even if nothing has changed.
        retries: How often training that crashed is continued from its last checkpoint.
    """
    return apart(settings, lambda name: bring_up_to_date(targets or [], force=force, retries=retries, experiment=name))


@flow(name="evaluate-only", task_runner=ONE_AT_A_TIME, persist_result=False)
def evaluate_only(settings: dict[str, Any] | None = None) -> State[object]:
    """Judge the model there is, and never train: a run whose adapter would have to be trained again fails, and says why.

    Args:
        settings: Settings otherwise than in params.yaml, by dotted names; the run is then a DVC experiment.
    """
    return apart(settings, _evaluate)


def _evaluate(name: str | None) -> State[object]:
    try:
        stale = graph.stale([stage.name for stage in graph.plan([RESUMES])])
    except Problem as problem:
        return Failed(message=str(problem))
    if stale:
        changes = "; ".join(f"{stage}: {', '.join(why)}" for stage, why in stale.items())
        return Failed(
            message=f"it would have to be trained first, for something has changed; run the pipeline. {changes}"
        )
    return bring_up_to_date([JUDGES], force=False, retries=0, experiment=name)


def apart(settings: Mapping[str, Any] | None, work: Callable[[str | None], State[object]]) -> State[object]:
    """Do the work of the current flow run: in a checkout of its own where settings differ from params.yaml, else here.

    Args:
        settings: by dotted names, as `flows.form` has them.
        work: is given the name of the experiment, None where there is none; the current folder is its checkout.

    Returns:
        The state that `work` returns. If it is completed, the checkout is saved as a DVC experiment.
    """
    root = Path.cwd()
    try:
        changed = form.overrides(settings or {}, root)
        if not changed:
            return work(None)
        get_run_logger().info("otherwise than in params.yaml: %s", changed)
        name = form.experiment_name(runtime.flow_run.name, runtime.flow_run.id)
        with experiments.checkout(root, name, changed) as folder:
            with _in(folder, experiments.environment(folder, name)):
                state = work(name)
            if state.is_completed():
                experiments.save(folder, name)
                state.message = f"{state.message}; kept as DVC experiment {name}: dvc exp apply {name}"
            return state
    except Problem as problem:
        return Failed(message=str(problem))


@contextmanager
def _in(folder: Path, variables: Mapping[str, str]) -> Iterator[None]:
    """The work of this process is done in that folder, with these variables for what it starts."""
    before = {name: os.environ.get(name) for name in variables}
    with chdir(folder):
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def bring_up_to_date(
    targets: Sequence[str], *, force: bool, retries: int, experiment: str | None = None
) -> State[object]:
    """Run stages in the current folder, each as a task of the current flow run, and write its report.

    Args:
        targets: as of `pipeline`.
        force: run those that nothing has changed for too.
        retries: of training.
        experiment: name of the DVC experiment that this folder is the checkout of.

    Returns:
        The state that the flow run is to end in.
    """
    runner, served = os.getppid(), runtime.deployment.id is not None
    life = Life(Path.cwd(), str(runtime.flow_run.id), served=served)
    with suppress(Exception):  # what is wrong with DVC here, the next line says better
        graph.mend_locks()
    try:
        stages = graph.plan(targets)
    except Problem as problem:
        return Failed(message=str(problem))
    stop = threading.Event()
    grace = RUNNER_GRACE if served else graph.PATIENCE
    futures: dict[str, _Future] = {}

    def unheard() -> bool:
        """Whether nobody else watches for a cancel: the run was started by hand, or its runner has died."""
        return not served or os.getppid() != runner

    try:
        for stage in stages:
            run = reproduce.with_options(name=stage.name, task_run_name=stage.name, retries=retries)
            needs = [futures[need] for need in stage.needs]
            future = run.submit(stage.name, force, stop, grace, life, wait_for=needs, return_state=False)
            futures[stage.name] = cast(_Future, future)
        cancelled = _wait(futures, unheard)
    except Pause:  # somebody has suspended the run: what runs saves and stops, and Resume starts the flow again
        _stop(futures, stop, life)
        raise
    except (KeyboardInterrupt, TerminationSignal):
        _stop(futures, stop, life)
        if not unheard():
            raise  # the runner sent the signal, and records how the run ended
        cancelled, message = True, "stopped by a signal; what ran has saved its work"
    else:
        message = "cancelled; what ran has saved its work"
        if cancelled:
            _stop(futures, stop, life)
    for future in futures.values():
        future.wait()  # it is done; without this its state would be asked of the server, which may not have heard yet
    states = {name: future.state for name, future in futures.items()}
    end: State[object] = Cancelled(message=message) if cancelled else _conclusion(states)
    ends = {name: reconcile.told(state) for name, state in states.items()}
    life.note(ended=True, state=reconcile.told(end), stages=ends)
    life.await_server(_api(), get_run_logger().warning)
    if not cancelled:
        with suppress(Exception):  # the server is away for good: the run is done all the same
            report.publish(stages, states, experiment)
    return end


def _wait(futures: dict[str, _Future], unheard: Callable[[], bool]) -> bool:
    """Wait for all stages; returns early, and True, when the flow run is cancelled and nobody else would notice.

    A run of a deployment has a runner that watches for a cancel and sends a signal; a run started by hand has nobody.
    """
    with get_client(sync_client=True) as client:
        for future in futures.values():
            while not future.wrapped_future.done():
                future.wait(timeout=_CANCEL_POLL)
                if not unheard() or not answers(_api()):  # a server that is away stops nothing
                    continue
                with suppress(Exception):
                    state = client.read_flow_run(runtime.flow_run.id).state
                    if state is not None and (state.is_cancelling() or state.is_cancelled()):
                        return True
    return False


def _stop(futures: dict[str, _Future], stop: threading.Event, life: Life) -> None:
    stop.set()
    wait([future.wrapped_future for future in futures.values()])
    life.note(ended=True)  # one that is still saving is not to be told a second time


def _api() -> str:
    return str(PREFECT_API_URL.value())


def _conclusion(states: dict[str, State[object]]) -> State[object]:
    failed = [f"stage {name} failed: {_reason(name, state)}" for name, state in states.items() if state.is_failed()]
    if failed:
        return Failed(message="\n".join(failed))
    unfinished = [name for name, state in states.items() if not state.is_completed()]
    if unfinished:
        return Failed(message=f"stages {', '.join(unfinished)} did not finish; their states in this run say why")
    counts = {name: [state.name for state in states.values()].count(name) for name in graph.Outcome}
    return Completed(
        message=f"{len(states)} stages: {counts[graph.Outcome.EXECUTED]} executed, "
        f"{counts[graph.Outcome.CACHED]} up to date, {counts[graph.Outcome.RESTORED]} restored from the run cache"
    )


def _reason(name: str, state: State[object]) -> str:
    return (state.message or "").removeprefix(f"{name}: ").removeprefix(f"{graph.short_name(name)}: ")
