"""The deployments in a work pool: a real server and worker of processes; of containers and clusters what would be started."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from miniature import processes_in, wait_until
from up import call

ROOT = Path(__file__).parents[2]
REPOSITORY = "/rwkv-flow"


def template(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "deploy" / f"{name}.json").read_text())
    return loaded


def configured(kind: Any, name: str, **values: Any) -> Any:
    """What the worker makes of the template for a flow run."""
    from prefect.client.schemas.objects import Flow, FlowRun

    configuration = asyncio.run(kind.job_configuration.from_template_and_values(template(name), values))
    run = FlowRun(id=uuid4(), flow_id=uuid4(), name="swift-otter", deployment_id=uuid4())
    configuration.prepare_for_flow_run(run, flow=Flow(name="pipeline"))
    return configuration


@pytest.fixture
def nothing_is_asked() -> Iterator[None]:
    """A server is named, else Prefect would start one; it need not be there."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://prefect:4200/api"}):
        yield


@pytest.mark.parametrize("name", ["process", "docker", "kubernetes"])
def test_a_template_has_each_variable_it_uses(name: str):
    from prefect.utilities.templating import find_placeholders

    whole = template(name)
    used = {placeholder.name for placeholder in find_placeholders(whole["job_configuration"])}
    properties = whole["variables"]["properties"]
    assert used == properties.keys()
    assert all({"title", "description", "type"} <= variable.keys() for variable in properties.values())


def test_a_container_has_the_cards_and_a_volume_that_outlives_it(nothing_is_asked: None):
    worker = pytest.importorskip("prefect_docker.worker")
    settings = configured(
        worker.DockerWorker,
        "docker",
        env={"PREFECT_API_URL": "http://prefect:4200/api", "MLFLOW_TRACKING_URI": "http://mlflow:5000"},
    )
    made = worker.DockerWorker("pool")._build_container_settings(None, settings)
    assert made["image"] == "rwkv-flow:latest"
    assert made["volumes"] == [f"rwkv-flow:{REPOSITORY}"]
    assert made["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert made["command"] == "prefect flow-run execute"

    from docker.models.containers import _create_container_args

    args = _create_container_args(made | {"version": "1.45"})
    (cards,) = args["host_config"]["DeviceRequests"]
    assert (cards["Driver"], cards["Count"], cards["Capabilities"]) == ("nvidia", -1, [["gpu"]])


def test_a_job_has_the_cards_and_a_volume_that_outlives_it(nothing_is_asked: None):
    worker = pytest.importorskip("prefect_kubernetes.worker")
    manifest = configured(worker.KubernetesWorker, "kubernetes", gpus="2", claim="mine").job_manifest
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "rwkv-flow:latest"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2", "memory": "32Gi"}
    assert container["volumeMounts"][0]["mountPath"] == REPOSITORY
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "mine"
    assert "PREFECT__FLOW_RUN_ID" in {variable["name"] for variable in container["env"]}
    assert manifest["spec"]["backoffLimit"] == 0  # it is Prefect that tries again

    client = pytest.importorskip("kubernetes_asyncio.client")
    known = client.V1PodSpec.attribute_map.values(), client.V1JobSpec.attribute_map.values()
    assert pod.keys() <= set(known[0])
    assert manifest["spec"].keys() <= set(known[1])


def test_the_image_and_the_volume_are_where_the_templates_expect_them():
    from ruamel.yaml import YAML

    recipe = (ROOT / "deploy/Dockerfile").read_text()
    assert f"WORKDIR {REPOSITORY}\nCOPY . ." in recipe
    claim, job = YAML(typ="safe").load_all((ROOT / "deploy/volume.yaml").read_text())
    assert claim["metadata"]["name"] == template("kubernetes")["variables"]["properties"]["claim"]["default"]
    assert f"cp -a {REPOSITORY}/. /volume" in job["spec"]["template"]["spec"]["containers"][0]["command"][-1]


def rwkvflow(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words], capture_output=True, text=True, env=os.environ, check=False
    )


def test_a_pool_that_is_not_there(prefect_server: str, repository: Path):
    (repository / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    refused = rwkvflow("deploy", "--pool", "nowhere")
    assert refused.returncode == 1
    assert "rwkvflow: --pool nowhere: the server has no such work pool; make it: prefect work-pool" in refused.stderr


@pytest.mark.slow
def test_a_worker_of_processes_runs_the_pipeline(prefect_server: str, repository: Path, tmp_path: Path):
    (repository / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    prefect = [sys.executable, "-m", "prefect"]
    create = [
        "work-pool",
        "create",
        "--type",
        "process",
        "--base-job-template",
        str(ROOT / "deploy/process.json"),
        "cards",
    ]
    subprocess.run([*prefect, *create], check=True, capture_output=True)
    wrong = rwkvflow("deploy", "--pool", "cards", "--retrain-cron", "every night")
    assert "--retrain-cron 'every night': is not a cron expression" in wrong.stderr
    offered = rwkvflow("deploy", "--pool", "cards", "--retrain-cron", "0 3 * * *")
    assert offered.returncode == 0, offered.stderr
    assert "pipeline/cards is offered through cards" in offered.stdout

    retrain = call(f"{prefect_server}/deployments/name/retrain/cards")
    assert [schedule["schedule"]["cron"] for schedule in retrain["schedules"]] == ["0 3 * * *"]
    deployment = call(f"{prefect_server}/deployments/name/pipeline/cards")
    assert (
        deployment["parameter_openapi_schema"]["properties"]["settings"]["properties"]["train.epochs"]["default"] == 2
    )
    asked = call(
        f"{prefect_server}/deployments/{deployment['id']}/create_flow_run",
        {"state": {"type": "SCHEDULED"}, "parameters": {"targets": ["train"]}},
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with (elsewhere / "log").open("wb") as log:
        worker = subprocess.Popen(
            [*prefect, "worker", "start", "--pool", "cards", "--install-policy", "never"],
            cwd=elsewhere,
            env={**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            run = f"{prefect_server}/flow_runs/{asked['id']}"
            wait_until(lambda: call(run)["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED"), 180)
        finally:
            worker.terminate()
            worker.wait(60)
    state = call(run)["state"]
    assert state["message"] == "3 stages: 1 executed, 2 up to date, 0 restored from the run cache", (
        elsewhere / "log"
    ).read_text()
    assert (repository / "outputs/model.txt").exists()
    assert not processes_in(repository)
    assert not processes_in(elsewhere)
