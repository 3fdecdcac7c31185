"""A team's servers as deploy/compose.yaml sets them up, but for the containers: PostgreSQL, S3, Prefect and MLflow."""

import contextlib
import csv
import json
import os
import re
import shutil
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import servers
from miniature import free_port
from project import ROOT, Project, make
from ruamel.yaml import YAML

from tasks.stage import answers

pytestmark = pytest.mark.slow

SECRETS = {
    name: f"{name.lower().replace('_', '-')}-value"
    for name in (
        "POSTGRES_PASSWORD",
        "S3_KEY",
        "S3_SECRET",
        "PREFECT_PASSWORD",
        "MLFLOW_PASSWORD",
        "MLFLOW_SESSION_KEY",
    )
}
FILE = YAML(typ="safe").load(ROOT / "deploy/compose.yaml")


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """The environment of someone who works with the servers."""
    folder = tmp_path_factory.mktemp("team")
    ports = {name: free_port() for name in ("prefect", "mlflow")}
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(servers.postgres(SECRETS["POSTGRES_PASSWORD"], "prefect", "mlflow"))
        s3 = stack.enter_context(servers.s3(folder, "mlflow", "dvc"))
        places = {"@postgres:5432": f"@127.0.0.1:{postgres}", "http://s3:9000": s3}
        running = {
            name: stack.enter_context(composed(name, port, places, folder / name)) for name, port in ports.items()
        }
        urls = {"prefect": f"http://127.0.0.1:{ports['prefect']}/api", "mlflow": f"http://127.0.0.1:{ports['mlflow']}"}
        for name, process in running.items():
            servers.wait_for(process, folder / name / "log", lambda url=urls[name]: answers(url))
        yield {
            "PREFECT_API_URL": urls["prefect"],
            "PREFECT_API_AUTH_STRING": f"team:{SECRETS['PREFECT_PASSWORD']}",
            "MLFLOW_TRACKING_URI": urls["mlflow"],
            "MLFLOW_TRACKING_USERNAME": "team",
            "MLFLOW_TRACKING_PASSWORD": SECRETS["MLFLOW_PASSWORD"],
            "S3": s3,
            "POSTGRES": str(postgres),
            "LOGS": str(folder),
        }


def composed(name, port, places, folder):
    """A service of the compose file on a port of this machine."""
    folder.mkdir()
    service = FILE["services"][name]
    environment = {key: filled(value, places) for key, value in service["environment"].items()}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}
    python, *words = service["command"]
    assert python == "python"
    words[words.index("--host") + 1] = "127.0.0.1"
    words[words.index("--port") + 1] = str(port)
    return servers.started(
        [sys.executable, *words], folder / "log", cwd=folder, env=kept | {"PREFECT_HOME": str(folder)} | environment
    )


def filled(text, places):
    """As compose does it with deploy/.env; then, the places of this test."""
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: SECRETS[found[1]], text)
    for place, here in places.items():
        text = text.replace(place, here)
    return text


@pytest.fixture(scope="module")
def trained(team, tmp_path_factory):
    """Four checkouts that trained at the same time, two under a flow and two by dvc, and then told MLflow the rest."""
    first = make(tmp_path_factory.mktemp("trained") / "0")
    first.stage("prepare")
    first.dvc("commit", "-f", "prepare")
    projects = [first]
    for number in range(1, 4):
        copy = shutil.copytree(first.root, first.root.parent / str(number), symlinks=True)
        projects.append(Project(copy, dict(first.environment)))
    ours = {name: value for name, value in team.items() if name.startswith(("PREFECT_", "MLFLOW_"))}
    for number, project in enumerate(projects):
        project.environment |= ours
        project.set(seed=number)
    commands = [["flows.cli", "run", "train"], ["dvc", "repro", "train"]] * 2

    def work(project, command):
        said = project.run(sys.executable, "-m", *command).stdout
        return said + project.run(sys.executable, "-m", "flows.cli", "sync").stdout

    with ThreadPoolExecutor(4) as pool:
        for project, said in zip(projects, pool.map(work, projects, commands), strict=True):
            project.said = said
    return projects


@pytest.fixture(scope="module")
def client(team):
    from mlflow.tracking import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, team[name])
        yield MlflowClient(team["MLFLOW_TRACKING_URI"])


def runs(client):
    experiments = [found.experiment_id for found in client.search_experiments()]
    return {run.data.tags["rwkvflow.run"]: run for run in client.search_runs(experiments)}


def database(team, name, query):
    import psycopg2

    url = servers.database_url("", SECRETS["POSTGRES_PASSWORD"], int(team["POSTGRES"]), name)
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def bucket(team):
    import boto3

    s3 = boto3.client(
        "s3", endpoint_url=team["S3"], region_name="us-east-1",
        aws_access_key_id=SECRETS["S3_KEY"], aws_secret_access_key=SECRETS["S3_SECRET"],
    )  # fmt: skip
    listed = s3.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
    names = [item["Key"] for page in listed for item in page.get("Contents", [])]
    return {name: s3.get_object(Bucket="mlflow", Key=name)["Body"].read() for name in names}


def test_runs_that_write_at_once_are_whole(trained, client, team):
    found = runs(client)
    assert set(found) == {project.json("outputs/train/run.json")["id"] for project in trained}
    for project in trained:
        run = found[project.json("outputs/train/run.json")["id"]]
        assert run.info.status == "FINISHED"
        for name, file in (("train/loss", "history.csv"), ("valid/loss", "valid.csv")):
            with (project.root / "outputs/train" / file).open(newline="") as table:
                losses = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(table)}
            history = client.get_metric_history(run.info.run_id, name)
            assert {point.step: pytest.approx(point.value) for point in history} == losses
            assert len(history) == len(losses)
    assert database(team, "mlflow", "SELECT count(*) FROM runs WHERE status = 'FINISHED'") == [(4,)]


def test_artifacts_lie_in_the_bucket_and_are_read_through_mlflow(trained, client, team, tmp_path):
    stored = bucket(team)
    for number, (project, run) in enumerate(
        (project, runs(client)[project.json("outputs/train/run.json")["id"]]) for project in trained
    ):
        adapter = (project.root / "outputs/train/adapter.pth").read_bytes()
        assert adapter in [
            body for name, body in stored.items() if name.endswith(f"{run.info.run_id}/artifacts/train/adapter.pth")
        ]
        folder = tmp_path / str(number)
        folder.mkdir()
        assert (
            Path(client.download_artifacts(run.info.run_id, "train/adapter.pth", str(folder))).read_bytes() == adapter
        )


def test_prefect_shows_what_each_command_did(trained, team):
    query = "SELECT flow.name, state_type, count(*) FROM flow_run JOIN flow ON flow.id = flow_run.flow_id GROUP BY 1, 2"
    assert set(database(team, "prefect", query)) == {("pipeline", "COMPLETED", 2), ("stage", "COMPLETED", 2)}


def test_a_wrong_password_is_refused(team):
    assert servers.fetched(f"{team['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=1") is None
    assert servers.fetched(f"{team['PREFECT_API_URL']}/flows/filter", b"{}", "POST") is None


def test_no_password_is_left_anywhere(trained, team):
    """In nothing that a person or a server can read later: logs, outputs, records, tables, artifacts."""
    texts = {f"bucket {name}": body for name, body in bucket(team).items()}
    for folder in [Path(team["LOGS"]), *(project.root for project in trained)]:
        texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("params", "tags", "latest_metrics"):
        texts[f"mlflow {name}"] = str(database(team, "mlflow", f"SELECT * FROM {name}")).encode()
    for name in ("log", "flow_run", "task_run", "artifact"):
        texts[f"prefect {name}"] = str(database(team, "prefect", f"SELECT * FROM {name}")).encode()
    texts |= {f"printed by {project.root}": project.said.encode() for project in trained}
    secrets = {name: value.encode() for name, value in SECRETS.items() if name != "S3_KEY"}  # which says who, as a user
    assert not [(place, name) for place, text in texts.items() for name, secret in secrets.items() if secret in text]


def test_the_browser_asks_the_server_that_it_has_the_page_from(team):
    password = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    server = team["PREFECT_API_URL"].removesuffix("/api")
    password.add_password(None, server, "team", SECRETS["PREFECT_PASSWORD"])
    opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(password))
    with opener.open(f"{server}/ui-settings", timeout=60) as reply:
        assert json.load(reply)["api_url"] == "/api"


def test_nothing_of_the_compose_file_has_a_password_or_an_open_port():
    text = (ROOT / "deploy/compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+)", text))
    assert asked == set(SECRETS)
    assert text.count("${") == len(re.findall(r"\$\{\w+:\?", text))  # without a value, compose stops
    assert {
        line.partition("=")[0] for line in (ROOT / "deploy/env.example").read_text().splitlines() if "=" in line
    } == asked
    assert all(line.endswith("=") for line in (ROOT / "deploy/env.example").read_text().splitlines() if line[:1] != "#")
    for service in FILE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert "healthcheck" in service or service["entrypoint"]  # what ends by itself has none
