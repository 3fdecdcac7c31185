"""The training page in a real browser: a run is started in it, watched, and another cancelled; MLflow compares the two.

Its pictures are kept in the folder that RWKVFLOW_PICTURES names, else in the test's own.
"""

import json
import os
import subprocess
import urllib.parse
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import chromium
import pytest
from miniature import free_port, processes_in, wait_until
from project import Project, make, write_base
from up import call, started

UNDER_WAY = ("SCHEDULED", "PENDING", "RUNNING")
PATIENCE = 600_000  # milliseconds: what is waited for comes, however slow the machine is

pytestmark = [pytest.mark.slow, chromium.needed]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("RWKVFLOW_PICTURES", tmp_path / "pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page() -> Iterator[Any]:
    with chromium.launched() as browser:
        opened = browser.new_page(viewport={"width": 1400, "height": 1000})
        opened.set_default_timeout(PATIENCE)
        yield opened


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    made = make(tmp_path / "project")
    write_base(made.root / "models/other.pth", seed=1)
    monkeypatch.chdir(made.root)
    return made


def whole(page: Any, path: Path) -> None:
    """A picture of all that the page would scroll through."""
    heights = page.evaluate("[...document.querySelectorAll('*')].map(element => element.scrollHeight)")
    page.set_viewport_size({"width": 1400, "height": max(*heights, 1000) + 100})
    page.wait_for_timeout(500)  # until it is drawn
    page.screenshot(path=path)
    page.set_viewport_size({"width": 1400, "height": 1000})


def fill(page: Any, form: str, name: str, **fields: str) -> None:
    """Open a deployment's form and fill it in."""
    from playwright.sync_api import TimeoutError as TooLate

    for last in (False, False, True):  # as a person would: the server's page does not always come to its end
        with suppress(*() if last else (TooLate,)):
            page.goto(form, timeout=PATIENCE / 10)
            page.get_by_label("Context length (Optional)").wait_for(timeout=PATIENCE / 10)
            break
    page.get_by_label("Run Name").fill(name)
    for title, value in fields.items():
        page.get_by_label(f"{title.replace('_', ' ')} (Optional)", exact=True).fill(value)
    page.get_by_role("button", name="Add item").last.click()  # of the stages
    page.locator("textarea").last.fill("train")


def submit(page: Any, prefect: str, name: str) -> str:
    """The id of the run of this name, whose page is opened. The form's own link to it is there for seconds alone."""

    def runs() -> list[Any]:
        found: list[Any] = call(f"{prefect}/api/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}})
        return found

    for last in (False, False, True):  # as a person would: a click may come before the page listens
        page.get_by_role("button", name="Submit").click()
        with suppress(*() if last else (AssertionError,)):
            wait_until(runs, PATIENCE / 10_000)
            break
    (run,) = runs()
    page.goto(f"{prefect}/v2/runs/flow-run/{run['id']}")
    return str(run["id"])


def trained(mlflow: str) -> list[dict[str, Any]]:
    """The runs that MLflow knows."""
    api = f"{mlflow}/api/2.0/mlflow"
    experiments = call(f"{api}/experiments/search", {"max_results": 10})["experiments"]
    ids = [experiment["experiment_id"] for experiment in experiments]
    runs: list[dict[str, Any]] = call(f"{api}/runs/search", {"experiment_ids": ids}).get("runs", [])
    return runs


def test_a_training_is_started_watched_cancelled_and_compared(project: Project, page: Any, pictures: Path):
    prefect, mlflow = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    ports = (int(url.rpartition(":")[2]) for url in (prefect, mlflow))
    environment = project.environment | {"PYTHONPATH": str(project.root)}
    api = f"{prefect}/api"
    before = (
        subprocess.check_output(["git", "status", "--porcelain", "--untracked-files=no"]),
        Path("params.yaml").read_bytes(),
    )
    with started(*ports, environment=environment) as (process, output):
        wait_until(lambda: "Ctrl+C" in output.read_text() or process.poll() is not None, 240)
        names = {found["name"] for found in call(f"{api}/flows/filter", {})}
        assert names >= {"pipeline", "retrain", "evaluate-only"}
        deployment = call(f"{api}/deployments/name/pipeline/local")["id"]
        form = f"{prefect}/v2/deployments/deployment/{deployment}/run"

        page.goto(form)
        page.get_by_text("mine/base.pth", exact=True).click()
        page.get_by_text("models/other.pth").wait_for()  # a choice of what is there
        page.keyboard.press("Escape")
        page.get_by_role("tab", name="bone").click()
        page.get_by_text("Bone, today's MiSS").wait_for()
        whole(page, pictures / "form.png")

        fill(page, form, "Long Context", Context_length="48", rank="3")
        whole(page, pictures / "form-filled.png")
        first = submit(page, prefect, "Long Context")
        wait_until(lambda: call(f"{api}/flow_runs/{first}")["state"]["type"] not in UNDER_WAY, PATIENCE / 1000)
        state = call(f"{api}/flow_runs/{first}")["state"]
        assert "kept as DVC experiment long-context-" in state["message"]
        page.get_by_text("Completed", exact=True).first.wait_for()  # the page has followed it
        page.screenshot(path=pictures / "finished.png")
        found = call(f"{api}/artifacts/filter", {"flow_runs": {"id": {"any_": [first]}}})
        artifacts = {artifact["key"]: artifact["id"] for artifact in found}
        page.goto(f"{prefect}/v2/artifacts/artifact/{artifacts['pipeline-report']}")
        page.get_by_text(f"long-context-{first[:8]}").first.wait_for()
        page.screenshot(path=pictures / "report.png")
        page.goto(f"{prefect}/v2/artifacts/artifact/{artifacts['loss-curve']}")
        page.locator("img[src^='data:']").first.wait_for()
        page.wait_for_timeout(1000)  # until it is drawn
        page.screenshot(path=pictures / "curve.png")

        fill(page, form, "to be cancelled", Epochs="5000")
        second = submit(page, prefect, "to be cancelled")
        wait_until(lambda: len(trained(mlflow)) == 2, 240)
        page.get_by_role("button", name="Open menu").click()
        page.get_by_role("menuitem", name="Cancel").click()
        page.get_by_role("button", name="Cancel Flow Run").click()
        wait_until(lambda: call(f"{api}/flow_runs/{second}")["state"]["type"] == "CANCELLED", 120)
        page.get_by_text("Cancelled", exact=True).first.wait_for()
        page.screenshot(path=pictures / "cancelled.png")
        assert list(project.root.glob(".rwkvflow/runs/*/last.ckpt"))  # it has saved

        runs = trained(mlflow)
        query = {
            "runs": json.dumps([run["info"]["run_id"] for run in runs]),
            "experiments": json.dumps([runs[0]["info"]["experiment_id"]]),
        }
        page.goto(f"{mlflow}/#/compare-runs?{urllib.parse.urlencode(query)}")
        page.get_by_text("Comparing 2 Runs").wait_for()
        page.get_by_text(f"long-context-{first[:8]}").first.wait_for()
        page.set_viewport_size({"width": 1400, "height": 2000})
        page.wait_for_timeout(1000)  # until it is drawn
        page.screenshot(path=pictures / "compared.png")
    assert (
        subprocess.check_output(["git", "status", "--porcelain", "--untracked-files=no"]),
        Path("params.yaml").read_bytes(),
    ) == before
    left = [process.name() for process in processes_in(project.root)]
    assert not [name for name in left if not name.startswith(("chrom", "node"))]  # the browser is still open
