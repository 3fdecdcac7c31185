"""`promote` as a Prefect flow."""

from pathlib import Path

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from rwkv_core.errors import Problem
from tasks import params
from tasks.promote import Outcome
from tasks.promote import promote as promote_version

KEY = "promotion"
"""Of the artifact with the verdict."""


@task(name="judge", cache_policy=NO_CACHE, persist_result=False)
def judge(version: str) -> Outcome:
    """Judge a version, make it the champion if it passes, and leave the verdict as an artifact."""
    log = get_run_logger().info
    flow_run = str(runtime.flow_run.id)
    outcome = promote_version(Path.cwd(), version, params.load(), log, flow_run)
    create_markdown_artifact(
        markdown=outcome.report, key=KEY, description="Whether a model became the champion, and why."
    )
    return outcome


@flow(name="promote", persist_result=False)
def promote(version: str = "candidate") -> State[object]:
    """Judge a model against its base and the present champion, by the margins in params.yaml, and let it take the place.

    A run that completes as "Promoted" has moved the champion, one that completes as "Refused" has not; its artifact says why.
    Two at once wait for each other.

    Args:
        version: Which model: its number, the beginning of its sha256, or candidate, the newest one.
    """
    try:
        outcome = judge(version)
    except Problem as problem:
        return Failed(message=str(problem))
    name = "Promoted" if outcome.promoted else "Refused"
    word = "is the champion now" if outcome.promoted else "does not become the champion; the artifact says why"
    return Completed(name=name, message=f"version {outcome.version.number} {word}")
