"""The report that a pipeline run leaves in Prefect: what ran, what was measured, where the rest is."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State

from flows.graph import Stage
from rwkv_core.escape import markdown as markdown_of
from rwkv_core.escape import table
from tasks.mirror import RUN_TAG
from tasks.mlflow_run import without_password
from tasks.record import FILE, circumstances
from tasks.stage import MANIFEST, OUTPUTS, PREVIEW, answers

KEY = "pipeline-report"

_TRAINING_VIEW = "?workflowType=machine_learning"  # else MLflow opens its menus for LLM applications


def publish(stages: Sequence[Stage], states: Mapping[str, State[object]], experiment: str | None = None) -> None:
    """Write the report of the current flow run, as an artifact that the UI shows beside it."""
    create_markdown_artifact(
        markdown(stages, states, experiment), key=KEY, description="What ran, and what was measured."
    )


def markdown(stages: Sequence[Stage], states: Mapping[str, State[object]], experiment: str | None = None) -> str:
    """States and metrics as tables, the commit and the experiment, and where MLflow has the runs."""
    parts = [
        *([] if experiment is None else [f"DVC experiment: `{experiment}`"]),
        table(("stage", "state", ""), [(s.name, *_state(states[s.name])) for s in stages]),
        *(_metrics(path) for stage in stages for path in stage.metrics if path.is_file()),
        *_data(),
        f"Git commit: {_commit()}",
    ]
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    if tracking.startswith("http"):
        parts.append(f"Training in MLflow: {_run_link(tracking, without_password(tracking))}")
    return "\n\n".join(parts)


def _state(state: State[object]) -> tuple[str, str]:
    if state.name == "NotReady":
        return "not run", "a stage that it needs did not succeed"
    return state.name or "", "" if state.is_completed() else state.message or ""


def _metrics(path: Path) -> str:
    """One metrics file as a table, a row for each number in it, however deep."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return markdown_of(f"{path.name}: is not JSON: {error}")
    name = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return table((str(name), "value"), list(_rows(values)))


def _data() -> Iterator[str]:
    """How long the training documents are, what is likely wrong with the rows, and where the page is that shows them."""
    try:
        manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
        lengths, lints = manifest["train"]["lengths"], manifest["lints"]
    except (OSError, ValueError, KeyError):
        return
    yield table(("tokens up to", "documents"), [(most, str(count)) for most, count in lengths.items()])
    if lints:
        yield table(("likely wrong", "rows"), [(code, str(count)) for code, count in lints.items()])
    page = (PREVIEW / "preview.html").absolute()
    if page.is_file():
        yield f"What is learned, token by token: `{page}`"


def _rows(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _rows(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, float):
        yield prefix, f"{values:.6g}"
    else:
        yield prefix, str(values)


def _commit() -> str:
    git = circumstances(Path.cwd())["git"]
    if git["commit"] is None:
        return "none yet"
    return f"`{git['commit']}`{', with changes that are not committed' if git['dirty'] else ''}"


def _run_link(tracking: str, shown: str) -> str:
    """The page of the run that outputs/train belongs to; of all runs, where MLflow does not know it."""
    if not answers(shown):  # MLflow's client would try for minutes
        return f"[all runs]({shown})"
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with suppress(OSError, ValueError, KeyError, MlflowException):
        run = json.loads((OUTPUTS / "train" / FILE).read_text(encoding="utf-8"))["id"]
        client = MlflowClient(tracking)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for found in client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{run}'", max_results=1):
            page = (
                f"{shown.rstrip('/')}/#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}{_TRAINING_VIEW}"
            )
            return f"[{markdown_of(found.info.run_name or 'run')}]({page})"
    return f"[all runs]({shown})"
