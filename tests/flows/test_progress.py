"""A training's artifacts, from its own output and files."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from miniature import wait_until

from flows import progress

RUN = "0123456789abcdef"


def artifacts(client: Any, run: Any) -> dict[str, Any]:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    this = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    return {found.key: found for found in client.read_artifacts(artifact_filter=this)}


def write(path: Path, steps: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for step in steps:
            metrics = {"train/loss": 4 - step / 10, "train/tokens_per_second": 100.0 * step}
            file.write(json.dumps({"time": 0, "step": step, "metrics": metrics}) + "\n")


def test_progress_and_curve_are_changed_in_place(
    prefect_server: str, repository: Path, monkeypatch: pytest.MonkeyPatch
):
    from prefect import flow, task
    from prefect.client.orchestration import get_client
    from prefect.context import get_run_context

    monkeypatch.setattr(progress, "_EVERY", 0.1)
    metrics = repository / f".rwkvflow/runs/{RUN}/metrics.jsonl"
    write(metrics, range(1, 4))

    with get_client(sync_client=True) as client:

        @task
        def training() -> dict[str, Any]:
            run = get_run_context().task_run
            of = client.read_flow_run(run.flow_run_id)
            with progress.Progress(repository, run.flow_run_id, run.id) as shown:
                shown.read(f"training 7 parameters beside 2 matrices of RWKV-7, 2 layers of 32; run {RUN}")
                shown.read("step 1/10 loss 3.9 valid - lr 2.00e-03 tok/s 100 left 0:00:09")
                wait_until(lambda: progress.CURVE in artifacts(client, of))
                first = artifacts(client, of)
                write(metrics, range(4, 11))
            last = artifacts(client, of)
            assert {key: found.id for key, found in first.items()} == {key: found.id for key, found in last.items()}
            assert first[progress.PROGRESS].data == 30
            assert first[progress.CURVE].data != last[progress.CURVE].data
            return last

        @flow
        def training_flow() -> dict[str, Any]:
            return training()

        last = training_flow()
    assert last[progress.PROGRESS].data == 100
    assert last[progress.PROGRESS].description.startswith("step 10 of 10, loss 3.0000, 1000 tokens/s, ")
    head, _, body = str(last[progress.CURVE].data).partition(",")
    assert head == "![loss](data:image/svg+xml;base64"
    assert base64.b64decode(body.removesuffix(")")).startswith(b"<svg ")


def test_a_server_that_is_away_disturbs_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch):
    from uuid import uuid4

    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    monkeypatch.setattr(progress, "_EVERY", 0.1)
    write(repository / f".rwkvflow/runs/{RUN}/metrics.jsonl", range(1, 4))
    away = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(away), progress.Progress(repository, uuid4(), uuid4()) as shown:
        shown.read(f"x; run {RUN}")
        shown.read("step 1/10 loss")
