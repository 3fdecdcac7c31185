"""Real MLflow: SQLite files, and one server in a process of its own that is killed and comes back."""

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from rwkv_core.config import TrackingConfig
from rwkv_core.errors import Interrupted
from rwkv_core.files import sha256
from tasks import mirror, mlflow_run, tracking
from tasks.record import RunRecord, main_root
from tasks.registry import Registry

NAMES = TrackingConfig(experiment="tests", registered_model="tuned", also=())
PARAMS = {
    "seed": 42,
    "data": {"source": "corpus.jsonl"},
    "adapter": {"kind": "lora", "rank": 16, "alpha": 32, "targets": ["att.*", "ffn.*"]},
    "train": {"epochs": 2, "optimizer": {"lr": 0.002}},
}
BASE = {"path": "models/base.pth", "sha256": "b" * 64, "version": 7, "n_layer": 4, "n_embd": 64}
DATA = {"path": "corpus.jsonl", "sha256": "d" * 64, "rows": 900, "train": 81_000, "valid": 9_000}
STEPS = 12
CONFORMS = "pth (rwkv 0.8.32), st (reference)"

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's use of SQLAlchemy


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """MLflow's migrations take a second; a copied file takes none."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow_run.make_database(path)
    return path


@pytest.mark.slow
def test_a_database_is_made_once_and_whole(tmp_path):
    """By two that begin at once, and after one that was killed on the way."""
    path = tmp_path / "mlflow.db"
    code = "import sys, pathlib; from tasks.mlflow_run import make_database; make_database(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command) as killed:
        while not any(tmp_path.glob(".mlflow.db.*.tmp")):
            assert killed.poll() is None
            time.sleep(0.01)
        killed.kill()
    assert not path.exists()
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert [found.name for found in client(f"sqlite:///{path}").search_experiments()] == ["Default"]


@pytest.fixture
def root(tmp_path, empty_database, monkeypatch):
    """A checkout whose MLflow is the SQLite file in it."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "RWKVFLOW_FLOW_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "_SEND_SECONDS", 0.1)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return tmp_path


class MlflowServer:
    """A real server that can be killed and started again."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "mlartifacts")]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        until(self.answers, 60)

    def answers(self):
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
        except OSError:
            return False

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_database):
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(empty_database, folder / "mlflow.db")
    server = MlflowServer(folder)
    server.start()
    yield server
    server.kill()


def client(uri):
    mlflow_run.import_mlflow()
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def loss(step):
    return 3.0 / (1 + step) + 0.125


def record(root, **changes):
    made = RunRecord.fresh(root, digest="f00d", started=time.time() - 60, params=PARAMS, base=BASE, data=DATA)
    return made.model_copy(update=changes)


def folder_of(root, made):
    folder = root / ".rwkvflow" / "runs" / made.digest
    made.write(folder)
    return folder


def trained(root, *, merged=b"merged"):
    """A checkout in which every stage has run."""
    made = record(root, status="finished", finished=time.time(), seconds_trained=50.0)
    folder = folder_of(root, made)
    rows = [{"time": int((made.started + s) * 1000), "step": s, "metrics": {"train/loss": loss(s), "train/lr": 1e-3}}
            for s in range(STEPS)]  # fmt: skip
    rows.insert(6, {"time": int((made.started + 5) * 1000), "step": 5, "metrics": {"valid/loss": 2.5}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = root / "outputs"
    write(outputs / "data/manifest.json", {"source": {"sha256": DATA["sha256"]}, "rows": 900})
    write(outputs / "data/metrics.json", {"rows": 900, "dropped": 3, "train": {"tokens": 81_000}})
    made.write(outputs / "train")
    (outputs / "train/adapter.pth").write_bytes(b"adapter")
    table = "".join(f"{s},{s * 100},{loss(s)!r},0.001,1.0\n" for s in range(STEPS))
    (outputs / "train/history.csv").write_text("step,tokens,loss,lr,grad_norm\n" + table)
    (outputs / "train/valid.csv").write_text("step,loss\n5,2.5\n")
    write(outputs / "train/metrics.json", {"loss": loss(STEPS - 1), "peak_memory_mb": 812})
    merge(root, merged)
    sides = {"base": {"loss": 3.1, "perplexity": 22.2}, "tuned": {"loss": 2.4, "perplexity": 11.0}}
    write(outputs / "evaluate/metrics.json", {**sides, "gain": {"loss": 0.7, "interval": [0.6, 0.8]}})
    write(outputs / "evaluate/samples.json", {"samples": []})
    (outputs / "evaluate/report.html").write_text("<h1>better</h1>")
    (outputs / "evaluate/loss.svg").write_text("<svg/>")
    write(outputs / "export/conformance.json", {"conformance": {"passed": True, "conforms": CONFORMS}})
    (root / "params.yaml").write_text("seed: 42\n")
    return made


def merge(root, merged, state=None):
    outputs = root / "outputs"
    (outputs / "merged").mkdir(exist_ok=True)
    for name, data in (("model.pth", merged), ("state.pth", state)):
        (outputs / "merged" / name).unlink(missing_ok=True)
        if data is not None:
            (outputs / "merged" / name).write_bytes(data)
    receipt = {
        "base": {"sha256": BASE["sha256"]},
        "adapters": [{"path": "outputs/train/adapter.pth", "sha256": sha256(outputs / "train/adapter.pth")}],
        "merged": {"sha256": sha256(outputs / "merged/model.pth")},
    }
    write(outputs / "merged/receipt.json", receipt)


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def runs(uri):
    mlflow = client(uri)
    return mlflow.search_runs([e.experiment_id for e in mlflow.search_experiments()])


def the_run(uri, made):
    found = [run for run in runs(uri) if run.data.tags.get("rwkvflow.run") == made.id]
    assert len(found) == 1
    return found[0]


def curve(uri, run, name):
    return [(m.step, m.value) for m in client(uri).get_metric_history(run.info.run_id, name)]


def artifacts(uri, run, folder=""):
    found = {}
    for entry in client(uri).list_artifacts(run.info.run_id, folder or None):
        found |= artifacts(uri, run, entry.path) if entry.is_dir else {entry.path: entry.file_size}
    return found


def rows_in(root):
    """Every row of every table that a publish may write to."""
    tables = ("runs", "params", "tags", "metrics", "latest_metrics", "datasets", "inputs", "input_tags",
              "model_versions", "model_version_tags", "registered_models", "experiments")  # fmt: skip
    with sqlite3.connect(root / "mlflow.db") as database:
        return {table: sorted(map(repr, database.execute(f"SELECT * FROM {table}"))) for table in tables}


def forget(root):
    shutil.rmtree(root / ".rwkvflow" / "tracking")


def test_a_finished_run_is_mirrored_whole(root):
    made = trained(root)
    tracking.publish(root, NAMES)
    uri = tracking.uri(root)
    run = the_run(uri, made)
    assert (run.info.status, run.info.start_time, run.info.end_time) == (
        "FINISHED", int(made.started * 1000), int(made.finished * 1000))  # fmt: skip
    assert run.data.params["train.optimizer.lr"] == "0.002"
    assert run.data.params["adapter.targets"] == '["att.*", "ffn.*"]'
    assert run.data.params["base.n_layer"] == "4"
    assert curve(uri, run, "train/loss") == [(s, loss(s)) for s in range(STEPS)]
    assert curve(uri, run, "valid/loss") == [(5, 2.5)]
    numbers = run.data.metrics
    assert numbers["evaluate/tuned/loss"] == 2.4
    assert (numbers["evaluate/gain/interval/low"], numbers["evaluate/gain/interval/high"]) == (0.6, 0.8)
    assert numbers["final/peak_memory_mb"] == 812
    assert run.data.params["data.dropped"] == "3"
    assert not any(value in ("", "{}") for value in run.data.params.values())
    tags = run.data.tags
    assert (tags["rwkvflow.base"], tags["rwkvflow.data"]) == (BASE["sha256"], DATA["sha256"])
    assert tags["rwkvflow.adapter"] == "lora"
    assert "| loss | 3.1 | 2.4 |" in tags["mlflow.note.content"]
    inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert {context: (entry.name, entry.digest[0]) for context, entry in inputs.items()} == {
        "training": ("corpus-train", "d"), "evaluation": ("corpus-held-out", "d"), "base": ("base.pth", "b")}  # fmt: skip
    assert json.loads(inputs["evaluation"].profile) == {"rows": 900, "tokens": 9_000}
    assert run.data.params["data.train.tokens"] == "81000"
    assert "taught `corpus.jsonl` (900 rows, 81,000 tokens)" in run.data.tags["mlflow.note.content"]
    stored = artifacts(uri, run)
    model = sha256(root / "outputs/merged/model.pth")
    assert set(stored) == {
        "pipeline/params.yaml", "data/manifest.json", "data/metrics.json", "train/adapter.pth", "train/run.json",
        "train/history.csv", "train/valid.csv", "train/metrics.json", "merged/receipt.json",
        f"merged/{model[:12]}/model.pth", "evaluate/metrics.json", "evaluate/samples.json", "evaluate/report.html",
        "evaluate/loss.svg", "export/conformance.json"}  # fmt: skip
    (version,) = client(uri).search_model_versions("name='tuned'")
    assert (version.version, version.run_id) == (1, run.info.run_id)
    assert version.tags["merged.sha256"] == model
    assert version.tags["adapter.sha256"] == sha256(root / "outputs/train/adapter.pth")
    assert (version.tags["evaluate.tuned.loss"], version.tags["conforms"]) == ("2.4", CONFORMS)
    assert (root / "mlartifacts").is_dir()


def test_publishing_again_changes_nothing(root, monkeypatch, capsys):
    trained(root)
    tracking.publish(root, NAMES)
    before = rows_in(root)
    with monkeypatch.context() as nothing_to_send:
        nothing_to_send.setattr(tracking, "Server", None)
        tracking.publish(root, NAMES)
    forget(root)  # what is known of the server is gone: everything is compared again
    tracking.publish(root, NAMES)
    assert rows_in(root) == before
    assert capsys.readouterr() == ("", "")


def test_a_changed_report_is_stored_again_and_new_numbers_count(root):
    made = trained(root)
    tracking.publish(root, NAMES)
    uri = tracking.uri(root)
    write(root / "outputs/evaluate/metrics.json", {"base": {"loss": 3.1}, "tuned": {"loss": 2.0, "bits": math.nan}})
    (root / "outputs/evaluate/report.html").write_text("<h1>much better</h1>")
    tracking.publish(root, NAMES)
    run = the_run(uri, made)
    stored = root / "mlartifacts" / run.info.run_id / "artifacts/evaluate/report.html"
    assert stored.read_text() == "<h1>much better</h1>"
    assert run.data.metrics["evaluate/tuned/loss"] == 2.0
    assert client(uri).search_model_versions("name='tuned'")[0].tags["evaluate.tuned.loss"] == "2.0"
    before = rows_in(root)
    forget(root)
    tracking.publish(root, NAMES)
    assert rows_in(root) == before


def test_a_version_conforms_as_its_own_export_says(root):
    """The tag follows a new export, and a model whose export is still to come has none."""
    trained(root)
    tracking.publish(root, NAMES)
    write(root / "outputs/export/conformance.json", {"conformance": {"passed": True, "conforms": "gguf (llama.cpp)"}})
    tracking.publish(root, NAMES)
    merge(root, b"merged otherwise")
    shutil.rmtree(root / "outputs/export")
    tracking.publish(root, NAMES)
    versions = sorted(client(tracking.uri(root)).search_model_versions("name='tuned'"), key=lambda v: v.version)
    assert [version.tags.get("conforms") for version in versions] == ["gguf (llama.cpp)", None]


def test_each_merged_model_is_one_version(root):
    trained(root)
    tracking.publish(root, NAMES)
    merge(root, b"merged otherwise")
    tracking.publish(root, NAMES)
    merge(root, b"merged")  # the first again
    tracking.publish(root, NAMES)
    uri = tracking.uri(root)
    versions = sorted(client(uri).search_model_versions("name='tuned'"), key=lambda v: v.version)
    assert [v.version for v in versions] == [1, 2]
    kept = [next(Path(v.source.removeprefix("file://")).glob("model.pth")).read_bytes() for v in versions]
    assert kept == [b"merged", b"merged otherwise"]


def test_each_tuned_state_is_one_version(root):
    """The merged model is the base in all of them."""
    trained(root)
    for state in (b"one", b"another", b"one", None):
        merge(root, b"base", state)
        tracking.publish(root, NAMES)
    versions = sorted(client(tracking.uri(root)).search_model_versions("name='tuned'"), key=lambda v: v.version)
    found = [
        {path.name: path.read_bytes() for path in Path(v.source.removeprefix("file://")).iterdir()} for v in versions
    ]
    assert found == [{"model.pth": b"base", "state.pth": b"one"}, {"model.pth": b"base", "state.pth": b"another"},
                     {"model.pth": b"base"}]  # fmt: skip
    assert [v.tags.get("state.sha256") for v in versions] == [sha256_of(b"one"), sha256_of(b"another"), None]


def test_a_report_of_another_state_is_not_this_runs(root):
    made = trained(root)
    tuned = {"sha256": sha256_of(b"base"), "state_sha256": sha256_of(b"one"), "loss": 2.4}
    write(root / "outputs/evaluate/metrics.json", {"tuned": tuned})
    merge(root, b"base", b"another")
    tracking.publish(root, NAMES)
    assert not any(key.startswith("evaluate") for key in the_run(tracking.uri(root), made).data.metrics)
    merge(root, b"base", b"one")
    tracking.publish(root, NAMES)
    assert the_run(tracking.uri(root), made).data.metrics["evaluate/tuned/loss"] == 2.4


def sha256_of(data):
    return hashlib.sha256(data).hexdigest()


def test_new_data_that_nothing_was_trained_on_is_not_this_runs(root):
    made = trained(root)
    write(root / "outputs/data/manifest.json", {"sha256": "f" * 64})
    tracking.publish(root, NAMES)
    run = the_run(tracking.uri(root), made)
    assert "data.dropped" not in run.data.params
    assert "data/manifest.json" not in artifacts(tracking.uri(root), run)


def test_leftovers_of_another_adapter_are_not_this_runs(root):
    trained(root)
    outputs = root / "outputs"
    write(outputs / "evaluate/metrics.json", {"tuned": {"sha256": sha256(outputs / "merged/model.pth"), "loss": 2.4}})
    again = record(root, digest="beef", status="finished", finished=time.time())
    folder_of(root, again)
    again.write(outputs / "train")
    (outputs / "train/adapter.pth").write_bytes(b"another adapter")
    tracking.publish(root, NAMES)
    uri = tracking.uri(root)
    assert not any(key.startswith("evaluate") for key in the_run(uri, again).data.metrics)
    assert client(uri).search_model_versions("name='tuned'") == []
    merge(root, b"another merged model")  # the report is still the old one
    tracking.publish(root, NAMES)
    assert not any(key.startswith("evaluate") for key in the_run(uri, again).data.metrics)
    assert len(client(uri).search_model_versions("name='tuned'")) == 1


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same machine", "another machine"])
def test_a_server_that_knows_nothing_gets_everything(root, server, elsewhere, monkeypatch):
    made = trained(root, merged=f"merged {elsewhere}".encode())
    tracking.publish(root, NAMES)
    there = curve(tracking.uri(root), the_run(tracking.uri(root), made), "train/loss")
    if elsewhere:
        shutil.rmtree(root / ".rwkvflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    tracking.publish(root, NAMES)
    run = the_run(server.uri, made)
    assert curve(server.uri, run, "train/loss") == there
    assert ("train/grad_norm" in run.data.metrics) == elsewhere
    times = [m.timestamp for m in client(server.uri).get_metric_history(run.info.run_id, "train/loss")]
    assert run.info.start_time == times[0] < times[-1] <= run.info.end_time
    assert len(artifacts(server.uri, run)) == 15
    assert [v.run_id for v in client(server.uri).search_model_versions(f"run_id='{run.info.run_id}'")]
    with monkeypatch.context() as nothing_to_send:
        nothing_to_send.setattr(tracking, "Server", None)
        tracking.publish(root, NAMES)


def test_a_database_is_one_with_and_without_its_server(server, monkeypatch):
    root = server.folder
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    made = trained(root, merged=b"merged there")
    tracking.publish(root, NAMES)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (root / "outputs/evaluate/report.html").write_text("of the second")
    merge(root, b"merged here")
    tracking.publish(root, NAMES)
    run = the_run(server.uri, made)
    assert curve(server.uri, run, "train/loss") == [(s, loss(s)) for s in range(STEPS)]
    stored = artifacts(server.uri, run)
    assert stored["evaluate/report.html"] == len("of the second")
    versions = client(server.uri).search_model_versions(f"run_id='{run.info.run_id}'")
    assert len([place for place in stored if place.endswith("/model.pth")]) == len(versions) == 2


def test_a_wiped_database_is_written_again(root, empty_database):
    made = trained(root)
    wiped = f"{root}/wiped.db"  # another file: this process would go on with the one that it has open
    shutil.copyfile(empty_database, wiped)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{wiped}"
    try:
        tracking.publish(root, NAMES)
        Path(wiped).unlink()
        code = (
            "import sys; from pathlib import Path; from tasks import tracking;"
            "from rwkv_core.config import TrackingConfig as T;"
            "tracking.publish(Path(sys.argv[1]), T(experiment='tests', registered_model='tuned', also=()))"
        )
        done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("", "")
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    copy = shutil.copyfile(wiped, f"{root}/copy.db")
    run = the_run(f"sqlite:///{copy}", made)
    assert curve(f"sqlite:///{copy}", run, "train/loss") == [(s, loss(s)) for s in range(STEPS)]


def aliases(uri):
    return {alias: int(number) for alias, number in client(uri).get_registered_model("tuned").aliases.items()}


def three_models(root):
    """The merged models of three trainings, of which the second is champion; the versions."""
    for name in ("first", "second", "third"):
        shutil.rmtree(root / "outputs", ignore_errors=True)
        made = trained(root, merged=name.encode())
        (root / "outputs/data/train.bin").write_bytes(b"rows")
        data = {**DATA, "files": {"train.bin": sha256_of(b"rows")}}
        made.model_copy(update={"digest": name, "data": data}).write(root / "outputs/train")
        (root / "outputs/train/adapter.pth").write_bytes(name.encode())
        merge(root, name.encode())
        tracking.publish(root, NAMES)
    found = Registry(root)
    found.promote(found.find("1"), None)
    found.promote(found.find("2"), "a flow run")
    verdict = {"what": "held-out loss against the base", "found": "-0.1", "rule": "below 0", "passed": True}
    write(found.find("2").folder / "verdict.json", {"passed": True, "time": "2026", "checks": [verdict]})
    tracking.publish(root, NAMES)
    return found


def test_versions_have_aliases_and_say_what_they_were_made_from(root):
    known = three_models(root)
    uri = tracking.uri(root)
    assert aliases(uri) == {"candidate": 3, "champion": 2}
    tags = client(uri).get_model_version_by_alias("tuned", "champion").tags
    assert tags["base.sha256"] == BASE["sha256"]
    assert tags["data.sha256"] == DATA["sha256"]
    for name, path in (("manifest", "data/manifest.json"), ("receipt", "merged/receipt.json")):
        assert tags[f"{name}.sha256"] == sha256(known.find("2").folder / "outputs" / path)
    assert tags["gate.verdict"] == "passed"
    assert tags["gate.held-out loss against the base"] == "passed: -0.1; below 0"
    assert "gate.verdict" not in client(uri).get_model_version_by_alias("tuned", "candidate").tags
    before = rows_in(root)
    tracking.publish(root, NAMES)
    assert rows_in(root) == before
    known.rollback()
    tracking.publish(root, NAMES)
    assert aliases(uri) == {"candidate": 3, "champion": 1}


def test_a_wiped_database_gets_every_model_and_alias_back(root, empty_database, monkeypatch):
    """The outputs are of the third model alone by now, and MLflow's artifacts are gone too."""
    known = three_models(root)
    wiped = root / "another.db"
    shutil.copyfile(empty_database, wiped)
    shutil.rmtree(root / "mlartifacts")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{wiped}")
    tracking.publish(root, NAMES)
    uri = tracking.uri(root)
    assert aliases(uri) == {"candidate": 3, "champion": 2}
    found = {v.version: v for v in client(uri).search_model_versions("name='tuned'")}
    for number, model in enumerate((b"first", b"second", b"third"), 1):
        version = known.find(str(number))
        folder = Path(found[number].source.removeprefix("file://"))
        assert (folder / "model.pth").read_bytes() == model
        assert (folder / "model.pth").samefile(version.model)
        run = client(uri).get_run(found[number].run_id)
        assert run.data.tags["rwkvflow.run"] == version.record.id
        assert "evaluate/report.html" in artifacts(uri, run)
        assert run.data.metrics["evaluate/tuned/loss"] == 2.4
    assert found[2].tags["gate.verdict"] == "passed"


def test_a_version_that_was_deleted_there_is_left_so(root):
    three_models(root)
    uri = tracking.uri(root)
    client(uri).delete_model_version("tuned", "3")
    write(root / "outputs/evaluate/metrics.json", {"tuned": {"loss": 1.0}})
    tracking.publish(root, NAMES)
    assert sorted(v.version for v in client(uri).search_model_versions("name='tuned'")) == [1, 2]
    assert aliases(uri) == {"champion": 2}


def test_an_alias_that_another_machine_has_moved_is_left_to_it(root):
    known = three_models(root)
    uri = tracking.uri(root)
    client(uri).set_registered_model_alias("tuned", "champion", "3")
    write(root / "outputs/evaluate/metrics.json", {"tuned": {"loss": 1.0}})
    tracking.publish(root, NAMES)
    assert aliases(uri)["champion"] == 3
    known.promote(known.find("1"), None)
    tracking.publish(root, NAMES)
    assert aliases(uri)["champion"] == 1


def test_two_processes_make_one_run(root):
    made = trained(root)
    code = (
        "import sys; from pathlib import Path; from tasks import tracking;"
        "from rwkv_core.config import TrackingConfig as T;"
        "tracking.publish(Path(sys.argv[1]), T(experiment='tests', registered_model='tuned', also=()))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, root]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    run = the_run(tracking.uri(root), made)
    assert len(curve(tracking.uri(root), run, "train/loss")) == STEPS
    assert len(client(tracking.uri(root)).search_model_versions("name='tuned'")) == 1


def test_live_metrics_arrive_while_it_trains_and_a_continued_run_is_the_same(root, monkeypatch):
    monkeypatch.setattr(tracking, "_SAMPLE_SECONDS", 0.2)
    uri = tracking.uri(root)
    made = record(root)
    folder = folder_of(root, made)

    def train_and_stop():
        with tracking.Live(folder, NAMES) as live:
            for step in range(8):
                live.log(step, {"train/loss": loss(step)})
            until(lambda: runs(uri) and len(curve(uri, runs(uri)[0], "train/loss")) == 8, 10)
            assert the_run(uri, made).info.status == "RUNNING"
            until(lambda: "system/cpu_utilization_percentage" in the_run(uri, made).data.metrics, 10)
            raise Interrupted(15, "stopped")

    with pytest.raises(Interrupted):
        train_and_stop()
    assert the_run(uri, made).info.status == "KILLED"
    assert RunRecord.read(folder).status == "killed"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"time": 12, "st')  # torn by a power cut
    with tracking.Live(folder, NAMES) as live:
        until(lambda: the_run(uri, made).info.status == "RUNNING", 10)
        for step in range(5, STEPS):  # from the last checkpoint
            live.log(step, {"train/loss": loss(step)})
        until(lambda: len(curve(uri, the_run(uri, made), "train/loss")) == STEPS, 10)
        time.sleep(1.5)  # a system sample comes after a second
    run = the_run(uri, made)
    assert run.info.status == "FINISHED"
    assert curve(uri, run, "train/loss") == [(s, loss(s)) for s in range(STEPS)]
    samples = [step for step, _ in curve(uri, run, "system/system_memory_usage_percentage")]
    assert samples == list(range(len(samples)))


def test_a_fault_is_failed(root):
    made = record(root)
    folder = folder_of(root, made)

    def train_and_fail():
        with tracking.Live(folder, NAMES) as live:
            live.log(0, {"train/loss": math.nan, "train/grad_norm": math.inf})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_and_fail()
    assert the_run(tracking.uri(root), made).info.status == "FAILED"
    assert math.isnan(the_run(tracking.uri(root), made).data.metrics["train/loss"])


def test_a_process_that_died_without_a_word_is_killed(root):
    made = record(root)
    folder = folder_of(root, made)
    code = (
        "import os, sys; from pathlib import Path; from tasks import tracking;"
        "from rwkv_core.config import TrackingConfig as T;"
        "live = tracking.Live(Path(sys.argv[1]), T(experiment='tests', registered_model='tuned', also=())).__enter__();"
        "live.log(0, {'train/loss': 1.0}); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, folder], check=False).returncode == -9
    assert RunRecord.read(folder).status == "running"
    tracking.publish(root, NAMES)
    run = the_run(tracking.uri(root), made)
    assert run.info.status == "KILLED"
    assert curve(tracking.uri(root), run, "train/loss") == [(0, 1.0)]


def test_a_run_being_trained_is_left_to_its_own_process(root, monkeypatch):
    folder = folder_of(root, record(root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with tracking.Live(folder, NAMES) as live:
        live.log(0, {"train/loss": 1.0})
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        tracking.publish(root, NAMES)
        assert runs(tracking.uri(root)) == []


def test_without_a_server_a_stage_is_whole_and_the_next_publish_tells_all(root, server, monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://someone:secret@127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
    made = record(root)
    folder = folder_of(root, made)
    begun = time.monotonic()
    with tracking.Live(folder, NAMES) as live:
        for step in range(STEPS):
            live.log(step, {"train/loss": loss(step)})
            assert time.monotonic() - begun < 1
        time.sleep(0.5)
    assert time.monotonic() - begun < 4
    tracking.publish(root, NAMES)
    err = capsys.readouterr().err
    assert err.count("`rwkvflow sync` writes what is missing") == 2  # one of each
    assert "Connection refused" in err
    assert "secret" not in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    tracking.publish(root, NAMES)
    run = the_run(server.uri, made)
    assert run.info.status == "FINISHED"
    assert curve(server.uri, run, "train/loss") == [(s, loss(s)) for s in range(STEPS)]


def test_a_server_that_hangs_holds_nobody_for_long(root, monkeypatch, capsys):
    monkeypatch.setattr(mlflow_run, "_PROBE_SECONDS", 0.5)
    trained(root)
    folder = folder_of(root, record(root, digest="beef"))
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, says nothing
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        begun = time.monotonic()
        with tracking.Live(folder, NAMES) as live:
            live.log(0, {"train/loss": 1.0})
        tracking.publish(root, NAMES)
        assert time.monotonic() - begun < 4
    assert capsys.readouterr().err.count("did not answer (timed out)") == 2


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_gets_every_row_once(root, server, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    made = record(root)
    with tracking.Live(folder_of(root, made), NAMES) as live:
        for step in range(60):
            live.log(step, {"train/loss": loss(step), "train/lr": 1e-3})
            time.sleep(0.02)
        until(lambda: runs(server.uri), 10)
        server.kill()
        for step in range(60, 120):
            live.log(step, {"train/loss": loss(step), "train/lr": 1e-3})
            time.sleep(0.02)
        server.start()
        for step in range(120, 150):
            live.log(step, {"train/loss": loss(step), "train/lr": 1e-3})
    tracking.publish(root, NAMES)
    run = the_run(server.uri, made)
    assert run.info.status == "FINISHED"
    for name in ("train/loss", "train/lr"):
        assert [step for step, _ in curve(server.uri, run, name)] == list(range(150))
    assert capsys.readouterr().err.count("did not answer") == 1


def test_an_edited_description_stays(root):
    made = trained(root)
    tracking.publish(root, NAMES)
    uri = tracking.uri(root)
    client(uri).set_tag(the_run(uri, made).info.run_id, "mlflow.note.content", "the good one")
    write(root / "outputs/evaluate/metrics.json", {"base": {"loss": 3.0}, "tuned": {"loss": 2.0}})
    tracking.publish(root, NAMES)
    assert the_run(uri, made).data.tags["mlflow.note.content"] == "the good one"


def test_a_run_deleted_in_mlflow_is_left_so(root, capsys):
    made = trained(root)
    tracking.publish(root, NAMES)
    uri = tracking.uri(root)
    client(uri).delete_run(the_run(uri, made).info.run_id)
    (root / "outputs/evaluate/report.html").write_text("changed")
    tracking.publish(root, NAMES)
    assert runs(uri) == []
    assert "was deleted there" in capsys.readouterr().err


def test_limits_of_mlflow_are_kept(root):
    made = record(root)
    long = made.model_copy(
        update={"params": {**PARAMS, "prompts": ["long " * 4000], "many": {str(n): n for n in range(250)}}}
    )
    folder = folder_of(root, long)
    with tracking.Live(folder, NAMES) as live:
        live.log(0, {"loss [nats]": 1.0})
    run = the_run(tracking.uri(root), made)
    assert len(run.data.params["prompts"]) == 6000
    assert run.data.params["many.249"] == "249"
    assert "loss _nats_" in run.data.metrics


def test_a_copy_of_the_checkout_writes_to_the_main_one(tmp_path):
    main = tmp_path / "main"
    main.mkdir()
    git = ["git", "-C", str(main), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(main)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    subprocess.run([*git, "worktree", "add", "-q", str(tmp_path / "other")], check=True)
    copy = main / ".dvc/tmp/exps/tmp123"
    copy.mkdir(parents=True)
    assert main_root(main) == main_root(tmp_path / "other") == main_root(copy) == main.resolve()
    assert record(tmp_path / "other").git["branch"] == "other"
    assert record(tmp_path).git["commit"] is None


def test_a_record_is_read_as_it_was_written(tmp_path):
    made = record(tmp_path)
    made.write(tmp_path)
    assert RunRecord.read(tmp_path) == made
    (tmp_path / "run.json").write_text('{"id": "1"}')
    with pytest.raises(ValueError, match=r"run\.json: is not a run record.*; remove the folder"):
        RunRecord.read(tmp_path)


def test_importing_is_light():
    code = "import sys, tasks.tracking; print([m for m in ('mlflow', 'torch', 'pandas', 'sqlalchemy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_metrics_of_unknown_shape_are_no_trouble(tmp_path):
    write(
        tmp_path / "outputs/evaluate/metrics.json", {"a": None, "b": [1, 2, 3], "c": {"d": "text", "e": True, "f": 2}}
    )
    assert mirror.metrics(tmp_path, ["evaluate"]) == {"evaluate/c/f": 2.0}
    (tmp_path / "outputs/evaluate/metrics.json").write_text("not json")
    assert mirror.metrics(tmp_path, ["evaluate"]) == {}
