"""A stage run by bare DVC while a Prefect server answers: a flow of one task, visible there."""

import os

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from project import make


def runs_of(stage):
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[stage])))
        return [(run, client.read_logs(), client.read_task_runs()) for run in found]


@pytest.fixture
def project(tmp_path):
    return make(tmp_path / "project")


def test_a_stage_shows_where_a_server_answers(prefect_server, project):
    home = os.environ["PREFECT_HOME"]
    said = project.stage("prepare", PREFECT_API_URL=prefect_server, PREFECT_HOME=home).stdout
    assert "prepared 60 rows" in said
    [(run, _, tasks)] = [found for found in runs_of("prepare") if found[0].flow_id]
    assert run.state.is_completed()
    assert [task.state.type for task in tasks if task.flow_run_id == run.id] == ["COMPLETED"]

    project.set(data__source="mine/none.jsonl")
    failed = project.stage("prepare", check=False, PREFECT_API_URL=prefect_server, PREFECT_HOME=home)
    assert failed.returncode == 1
    assert "prepare: mine/none.jsonl" in failed.stdout.splitlines()[-1]
    states = sorted(found[0].state.name for found in runs_of("prepare"))
    assert states == ["Completed", "Failed"]
    assert any("mine/none.jsonl" in (found[0].state.message or "") for found in runs_of("prepare"))


def test_a_server_that_is_gone_changes_nothing(project):
    said = project.stage("prepare", PREFECT_API_URL="http://127.0.0.1:9/api").stdout
    assert "prepared 60 rows" in said
    assert "Traceback" not in said
