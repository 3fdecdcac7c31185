"""The pipeline as Prefect shows it: a real server, real DVC, real processes."""

import contextvars
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from miniature import dvc, processes_in, wait_until

ALL = ["demo/dvc.yaml:corpus", "prepare", "train", "evaluate"]

pytestmark = pytest.mark.usefixtures("prefect_server", "repository")


def run(**parameters: Any) -> Any:
    from flows.pipeline import pipeline

    return pipeline(**parameters, return_state=True)


def seen(state: Any, count: int = 4) -> dict[str, Any]:
    """The task runs of a flow run, by name, as the API tells them once they are all there."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    runs: dict[str, Any] = {}
    this = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:

        def all_there() -> bool:  # task runs reach the API a moment later, as events
            runs.update({run.name: run for run in client.read_task_runs(flow_run_filter=this)})
            ends = [run.state.is_final() or run.state.name == "NotReady" for run in runs.values() if run.state]
            return ends.count(True) == count

        wait_until(all_there)
    return runs


def states(state: Any, count: int = 4) -> dict[str, str]:
    return {name: run.state.name for name, run in seen(state, count).items()}


def logs(state: Any, text: str) -> list[tuple[str, bool]]:
    """The log lines in the API up to one that holds `text`, and whether each belongs to a task."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    found: list[Any] = []
    these = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:

        def arrived() -> bool:
            found[:] = client.read_logs(log_filter=these)
            return any(text in log.message for log in found)

        wait_until(arrived)
    return [(log.message, log.task_run_id is not None) for log in found]


def test_stages_are_task_runs_whose_states_tell_what_dvc_did():
    Path("outputs/data.txt").unlink()
    state = run()
    assert state.is_completed()
    assert state.message == "4 stages: 2 executed, 1 up to date, 1 restored from the run cache"
    assert states(state) == dict(zip(ALL, ["Cached", "Restored", "Completed", "Completed"], strict=True))
    assert ("train: done", True) in logs(state, "evaluate: reads")
    assert "up to date" in dvc("repro")
    assert list(states(run(targets=["train"], force=True), 3).values()) == ["Completed"] * 3


def test_the_report_has_states_and_metrics():
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    state = run(targets=["train"])
    this = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        (artifact,) = client.read_artifacts(artifact_filter=this)
    assert artifact.key == "pipeline-report"
    text = str(artifact.data)
    for line in ("| train | Completed |  |", "| loss.valid | 2.12346 |", "| steps | 10 |", "Git commit: `"):
        assert line in text
    assert "evaluate" not in text


def test_a_failed_stage_says_why_and_is_not_tried_again():
    Path("behaviour").write_text("fail")
    state = run()
    assert state.is_failed()
    assert state.message == "stage train failed: data/x.jsonl: has no rows; add some"
    runs = seen(state)
    assert runs["train"].state.message == "train: data/x.jsonl: has no rows; add some"
    assert runs["train"].run_count == 1
    assert runs["evaluate"].state.name == "NotReady"
    assert not Path("outputs/report.txt").exists()
    assert Path("tries").read_text() == "fail\n"


def test_a_crash_of_training_is_tried_again():
    Path("behaviour").write_text("crash once")
    state = run(targets=["train"])
    assert state.is_completed()
    assert seen(state, 3)["train"].run_count == 2
    assert Path("tries").read_text() == "crash once\nok\n"


@pytest.mark.slow
def test_a_crash_is_not_tried_again_without_retries():
    Path("behaviour").write_text("crash once")
    state = run(targets=["train"], retries=0)
    assert state.is_failed()
    assert "stage train failed: exited with code 137, SIGKILL" in state.message


def test_a_target_that_is_no_stage_fails_the_run_with_the_reason():
    state = run(targets=["trian"])
    assert state.is_failed()
    assert state.message.startswith("trian: ")


def test_a_cancel_reaches_the_stage_of_a_run_that_was_started_by_hand(repository: Path):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelling

    def cancel() -> None:
        wait_until(Path(repository, "running").exists)
        running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
        with get_client(sync_client=True) as client:
            for flow_run in client.read_flow_runs(flow_run_filter=running):
                client.set_flow_run_state(flow_run.id, Cancelling())

    Path("behaviour").write_text("slow")
    thread = threading.Thread(target=contextvars.copy_context().run, args=(cancel,))  # the server is in the context
    thread.start()
    state = run()
    thread.join()
    assert state.is_cancelled()
    assert Path("saved").exists()
    runs = seen(state)
    assert runs["train"].state.name == "Cancelled"
    assert runs["train"].state.message == "train: saved at step 7 and stopped"
    assert not processes_in(repository)
    Path("behaviour").write_text("ok")
    start = time.monotonic()
    dvc("repro")
    assert time.monotonic() - start < 20
