"""Training again on a schedule: when the data is other than it was the last time."""

import json
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import graph
from flows.pipeline import ONE_AT_A_TIME, bring_up_to_date
from rwkv_core.errors import Problem
from rwkv_core.files import whole_file
from tasks import params
from tasks.record import main_root

RECORD = Path(".rwkvflow/retrain.json")
"""Which data the last successful run has seen, in the main checkout."""

NOTHING_NEW = "Nothing new"
"""Name of the state of a run that had nothing to do."""


@flow(name="retrain", task_runner=ONE_AT_A_TIME, persist_result=False)
def retrain(fetch: bool = True, always: bool = False, retries: int = 1) -> State[object]:
    """Bring the pipeline up to date if data.source holds anything else than at the last retraining that succeeded.

    Args:
        fetch: First bring what is newest of it, where a .dvc file tracks it: dvc update of an import, else dvc pull.
        always: Do not look whether anything is new.
        retries: How often training that crashed is continued from its last checkpoint.
    """
    root = Path.cwd()
    try:
        source = params.load().data.source
        if fetch:
            graph.fetch(source, get_run_logger().info)
        seen = {"source": str(source), "content": graph.content(source)}
        if not always and (last := _last(root)) and {key: last.get(key) for key in seen} == seen:
            message = (
                f"{source} holds what it did when flow run {last.get('flow_run')} was trained on it; nothing is done"
            )
            return Completed(name=NOTHING_NEW, message=message)
        state = bring_up_to_date([], force=False, retries=retries)
        if state.is_completed():
            _write(root, seen | {"flow_run": str(runtime.flow_run.name)})
    except Problem as problem:
        return Failed(message=str(problem))
    return state


def _last(root: Path) -> dict[str, Any]:
    try:
        found = json.loads((main_root(root) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the first time, or it was damaged: then training finds that all is up to date
        return {}
    return found if isinstance(found, dict) else {}


def _write(root: Path, seen: dict[str, str]) -> None:
    path = main_root(root) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(seen, indent=1, sort_keys=True) + "\n", encoding="utf-8")
