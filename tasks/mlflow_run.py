"""A record's run on an MLflow server: found or made, and told what it lacks. Everything here may be done twice."""

import base64
import contextlib
import importlib
import json
import logging
import os
import shutil
import sqlite3
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from rwkv_core.config import TrackingConfig
from rwkv_core.errors import WorldError
from rwkv_core.files import link, marks, sha256, whole_file
from tasks import mirror
from tasks.mirror import Point
from tasks.record import RunRecord

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

# "mlflow." in front: its UI keeps such tags out of sight
CURVE_TAG = "mlflow.rwkvflow.curve"
"""Where a run's curves came from: "live", its metrics as they were made; "tables", rebuilt from history.csv."""

MIRROR_TAG = "mlflow.rwkvflow.mirror"
"""Digest of all that the run was last brought up to date with. Written last."""

DATABASE = "mlflow.db"
"""Name of the SQLite file in the main checkout, where runs are recorded unless MLFLOW_TRACKING_URI says otherwise."""

_ARTIFACTS_TAG, _NOTE_TAG = "mlflow.rwkvflow.artifacts", "mlflow.rwkvflow.note"
_BATCH = 1000  # metrics in one request; params and tags: 100 (mlflow/utils/validation.py)
_PROBE_SECONDS = 3.0

_ENVIRONMENT = {
    # MLflow's own are 120 s and 7 tries, with pauses in between: a dead server would hold a stage for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}

_STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


_importing = threading.Lock()


def import_mlflow() -> None:
    """Import MLflow, with short timeouts, no telemetry, no chatter; what is set outside stays.

    Its modules import each other in circles: two threads that import it at the same time get an ImportError.
    """
    with _importing:
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # one line for each retry otherwise
        importlib.import_module("mlflow.tracking")


class Ledger:
    """What was sent where, for one record: a file beside the run folders, safe to lose.

    Whoever reads or writes it, or the run on the server, holds `lock`: so two processes never make two runs.

    Args:
        main: the main checkout.
        record_id: of the record.
    """

    def __init__(self, main: Path, record_id: str) -> None:
        self._path = main / ".rwkvflow" / "tracking" / f"{record_id}.json"
        self._values: dict[str, Any] = {}

    @contextlib.contextmanager
    def lock(self, seconds: float) -> Iterator[None]:
        """Hold the record's lock; wait for it at most this long."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._path.with_suffix(".lock"), timeout=seconds):
            self._values = mirror.read_json(self._path)
            yield

    def server(self, uri: str) -> dict[str, Any]:
        """What is known of a server: run (its id there), offset (bytes of the live metrics sent), status."""
        known = self._values.setdefault("servers", {}).setdefault(without_password(uri), {})
        return dict(known)

    def note(self, uri: str, **values: Any) -> None:
        """Remember something of a server."""
        self._values.setdefault("servers", {}).setdefault(without_password(uri), {}).update(values)
        self.save()

    def digest(self, path: Path) -> str:
        """`sha256`, computed anew only if a size, time or inode changed. Call `save` afterwards."""
        known = self._values.setdefault("files", {})
        now = marks(path)
        entry = known.get(str(path))
        if not entry or entry[:-1] != now:
            known[str(path)] = entry = [*now, sha256(path)]
        return str(entry[-1])

    def save(self) -> None:
        """Write the file."""
        files = self._values.get("files", {})
        self._values["files"] = {path: entry for path, entry in files.items() if Path(path).exists()}
        with whole_file(self._path) as temporary:
            temporary.write_text(json.dumps(self._values, indent=1), encoding="utf-8")


def make_database(path: Path) -> None:
    """Make MLflow's SQLite file, if there is none, whole or not at all.

    MLflow makes it in many steps at its first use: two processes that begin at once spoil it for each other, and one that is
    killed for all that come.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        if path.exists():
            return
        import_mlflow()
        from mlflow.store.db import utils

        with whole_file(path) as temporary:
            engine = utils.create_sqlalchemy_engine(f"sqlite:///{temporary}")  # type: ignore[no-untyped-call]
            utils._initialize_tables(engine)  # type: ignore[no-untyped-call]
            engine.dispose()


class Server:
    """An MLflow server, or the SQLite file of one. Importing MLflow for it takes about 1 s.

    Args:
        uri: as in MLFLOW_TRACKING_URI.
        main: the main checkout, where artifacts lie when no server keeps them.
        tracking: names there.

    Raises:
        WorldError: nothing listens there.
    """

    def __init__(self, uri: str, main: Path, tracking: TrackingConfig) -> None:
        _probe(uri)
        import_mlflow()
        from mlflow.tracking import MlflowClient

        if uri.startswith("sqlite:///"):
            make_database(Path(uri.removeprefix("sqlite:///")))

        self.uri, self._main, self._tracking = uri, main, tracking
        self._client = MlflowClient(tracking_uri=uri)

    def find(self, record: RunRecord, known: dict[str, Any]) -> "Run | None":
        """The record's run, deleted or not; None if this server knows none."""
        from mlflow.entities import ViewType
        from mlflow.exceptions import MlflowException

        if known.get("run"):
            try:
                return self._client.get_run(known["run"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        # in any experiment: the name of ours may have been changed since
        experiments = [e.experiment_id for e in self._client.search_experiments(view_type=ViewType.ALL)]
        wanted = f"tags.`{mirror.RUN_TAG}` = '{record.id}'"
        found = self._client.search_runs(experiments, wanted, run_view_type=ViewType.ALL, order_by=["start_time ASC"])
        return found[0] if found else None

    def create(self, record: RunRecord, curve: str) -> "Run":
        """A new run for a record.

        Args:
            record: the run's.
            curve: where its curves will come from, "live" or "tables".
        """
        tags = {**mirror.tags(record), CURVE_TAG: curve, "mlflow.user": _user()}
        if record.sweep.get("id"):
            tags["mlflow.parentRunId"] = self.sweep(str(record.sweep["id"]), str(record.sweep["name"])).info.run_id
        return self._client.create_run(
            self._experiment(),
            start_time=int(record.started * 1000),
            tags=tags,
            run_name=mirror.name(record),
        )

    def sweep(self, key: str, name: str) -> "Run":
        """The run that a sweep's arms are nested under, found or made.

        Args:
            key: the sweep's id.
            name: what people call it.
        """
        with FileLock(self._main / f".rwkvflow/sweeps/{name}/mlflow.lock", timeout=60):  # its arms begin at once
            found = self._client.search_runs([self._experiment()], f"tags.`{mirror.RUN_TAG}` = '{key}'", max_results=1)
            if found:
                return found[0]
            tags = {mirror.RUN_TAG: key, "rwkvflow.sweep": name, "mlflow.user": _user()}
            return self._client.create_run(self._experiment(), tags=tags, run_name=name)

    def restore(self, run: "Run") -> None:
        """Take back a deletion."""
        self._client.restore_run(run.info.run_id)

    def put_status(self, run: "Run", status: str, seconds: float | None) -> None:
        """Set a run's status.

        Args:
            run: as it is on the server.
            status: as in a record.
            seconds: when it ended, since 1970.
        """
        wanted, end = _STATUS[status], int((seconds or time.time()) * 1000)
        if status == "running":
            if run.info.status != wanted:
                self._client.update_run(run.info.run_id, status=wanted)
        elif (run.info.status, run.info.end_time) != (wanted, end):
            self._client.set_terminated(run.info.run_id, status=wanted, end_time=end)

    def put_facts(self, run: "Run", record: RunRecord, counts: dict[str, Any]) -> None:
        """Write params, tags and lineage that the run lacks. A param once written stays: MLflow forbids changing it."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        held = run.data
        params = [Param(key, value) for key, value in mirror.params(record, counts).items() if key not in held.params]
        tags = [RunTag(key, value) for key, value in mirror.tags(record).items() if held.tags.get(key) != value]
        for chunk in _chunks(params, 100):
            self._client.log_batch(run.info.run_id, params=chunk)
        for chunk in _chunks(tags, 100):
            self._client.log_batch(run.info.run_id, tags=chunk)
        there = (
            {(entry.dataset.name, entry.dataset.digest) for entry in run.inputs.dataset_inputs} if run.inputs else set()
        )
        inputs = [
            DatasetInput(
                Dataset(item.name, item.digest, "local", json.dumps({"uri": item.source}), profile=item.profile),
                [InputTag("mlflow.data.context", item.context)],
            )
            for item in mirror.lineage(record)
            if (item.name, item.digest) not in there
        ]
        if inputs:
            self._client.log_inputs(run.info.run_id, datasets=inputs)

    def put_note(self, run: "Run", text: str) -> None:
        """Write the run's description, unless a person has edited it."""
        held, ours = run.data.tags.get("mlflow.note.content"), run.data.tags.get(_NOTE_TAG)
        if held != text and (held is None or _short(held) == ours):
            self.put_tags(run, {"mlflow.note.content": text, _NOTE_TAG: _short(text)})

    def put_tags(self, run: "Run", tags: dict[str, str]) -> None:
        """Set tags of a run."""
        from mlflow.entities import RunTag

        self._client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def put_live(self, run: "Run", path: Path, ledger: Ledger) -> None:
        """Send the lines of a metrics.jsonl that this server lacks, in their order.

        The ledger tells which; a line sent twice all the same, for the answer got lost, stays one: MLflow keeps one row
        for each name, step, time and value.
        """
        known = ledger.server(self.uri)
        offset = known.get("offset", 0) if known.get("run") == run.info.run_id else 0
        if offset > path.stat().st_size:
            offset = 0
        batch: list[Point] = []
        for end, points in mirror.live_points(path, offset):
            if len(batch) + len(points) > _BATCH:
                self._put_points(run, batch)
                ledger.note(self.uri, run=run.info.run_id, offset=offset)
                batch = []
            batch += points
            offset = end
        if batch or known.get("run") != run.info.run_id:
            self._put_points(run, batch)
            ledger.note(self.uri, run=run.info.run_id, offset=offset)

    def put_tables(self, run: "Run", points: list[Point]) -> None:
        """Send the points whose step the run's curves lack.

        To a run that was logged live only its own curves are filled up; one without any gets all of them.
        """
        held = set(run.data.metrics) & {point.name for point in points}
        steps = {
            name: {metric.step for metric in self._client.get_metric_history(run.info.run_id, name)} for name in held
        }
        filling = bool(held) and run.data.tags.get(CURVE_TAG) == "live"
        lacking = [p for p in points if p.step not in steps.get(p.name, set()) and (p.name in held or not filling)]
        self._put_points(run, lacking)

    def put_numbers(self, run: "Run", numbers: dict[str, float]) -> None:
        """Write the final metrics that are new or have changed."""
        held, now = run.data.metrics, int(time.time() * 1000)
        self._put_points(
            run, [Point(k, v, now, 0) for k, v in numbers.items() if k not in held or not _same(held[k], v)]
        )

    def put_files(self, run: "Run", files: dict[str, tuple[Path, str]]) -> None:
        """Store the artifacts whose bytes are not those stored before.

        Args:
            run: as it is on the server.
            files: by their name there, each with its sha256.
        """
        stored: dict[str, str] = _parsed(run.data.tags.get(_ARTIFACTS_TAG))
        changed = {place: entry for place, entry in files.items() if stored.get(place) != entry[1][:12]}
        for place, (path, digest) in changed.items():
            self._store(run, path, place)
            stored[place] = digest[:12]
        if changed:
            tag = json.dumps(stored, separators=(",", ":"))
            while len(tag) > 8000:  # MLflow's limit: what is not remembered is stored again next time
                stored.pop(next(iter(stored)))
                tag = json.dumps(stored, separators=(",", ":"))
            self.put_tags(run, {_ARTIFACTS_TAG: tag})

    def versions(self) -> "dict[tuple[str | None, str | None], ModelVersion]":
        """Those of the registered model, by the sha256 of their checkpoint and of their state."""
        found: dict[tuple[str | None, str | None], ModelVersion] = {}
        token, query = None, f"name='{self._tracking.registered_model}'"
        while token != "":
            page = self._client.search_model_versions(query, page_token=token)
            found |= {(v.tags.get("merged.sha256"), v.tags.get("state.sha256")): v for v in page}
            token = page.token or ""
        return found

    def put_version(
        self,
        run: "Run",
        found: "ModelVersion | None",
        files: Sequence[Path],
        tags: dict[str, str],
        description: str,
    ) -> str:
        """Register a merged model, or bring the tags of its version up to date.

        Args:
            run: the run that made it, which stores the files.
            found: its version, if there is one.
            files: the checkpoint, and a tuned state to mount on it, if there is one.
            tags: of the version; merged.sha256 and state.sha256 tell it from others.
            description: of a new version.

        Returns:
            The version's number.
        """
        name = self._tracking.registered_model
        if found is None:
            # a folder for each: the next model of the same run must not take the place of this version's file
            folder = "-".join(tags[key][:12] for key in ("merged.sha256", "state.sha256") if key in tags)
            for file in files:
                self._store(run, file, f"merged/{folder}/{file.name}", as_link=True)
            source = f"{run.info.artifact_uri}/merged/{folder}"
            made = self._client.create_model_version(
                name, source, run.info.run_id, tags=tags, description=description, await_creation_for=0
            )
            return str(made.version)
        for key, value in tags.items():
            if found.tags.get(key) != value:
                self._client.set_model_version_tag(name, found.version, key, value)
        return str(found.version)

    def registered_model(self) -> tuple[dict[str, str], dict[str, str]]:
        """Tags of the registered model, and the version's number of each of its aliases. It is made, if there is none."""
        from mlflow.exceptions import MlflowException

        name = self._tracking.registered_model
        with contextlib.suppress(MlflowException):  # it exists; what else may be wrong, the next call says
            self._client.create_registered_model(name)
        model = self._client.get_registered_model(name)
        return dict(model.tags), {alias: str(number) for alias, number in model.aliases.items()}

    def put_alias(self, alias: str, number: str) -> None:
        """Let an alias of the registered model be this version."""
        self._client.set_registered_model_alias(self._tracking.registered_model, alias, number)

    def put_model_tag(self, key: str, value: str) -> None:
        """Set a tag of the registered model."""
        self._client.set_registered_model_tag(self._tracking.registered_model, key, value)

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._tracking.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            location = (self._main / "mlartifacts").as_uri() if _is_local(self.uri) else None
            try:
                return self._client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                found = self._client.get_experiment_by_name(name)  # another process was first
                if found is None:
                    raise error
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _put_points(self, run: "Run", points: Iterable[Point]) -> None:
        from mlflow.entities import Metric

        for chunk in _chunks(points, _BATCH):
            self._client.log_batch(run.info.run_id, metrics=[Metric(p.name, p.value, p.time, p.step) for p in chunk])

    def _store(self, run: "Run", path: Path, place: str, *, as_link: bool = False) -> None:
        """Store a file as an artifact. With `as_link`, on this machine's disk, as a second name of the same bytes."""
        folder = self._artifact_folder(run)
        if folder is None:
            self._client.log_artifact(run.info.run_id, str(path), str(Path(place).parent))
            return
        if as_link:
            link(path, folder / place)  # gigabytes
            return
        with whole_file(folder / place) as temporary:
            shutil.copyfile(path, temporary)

    def _artifact_folder(self, run: "Run") -> Path | None:
        """Where a run's artifacts lie on this machine; None if a server or a bucket keeps them."""
        location = urllib.parse.urlsplit(str(run.info.artifact_uri))
        if location.scheme == "file":
            return Path(urllib.request.url2pathname(location.path))
        if location.scheme == "mlflow-artifacts" and _is_local(self.uri):
            # made through `mlflow server` and now opened without it: its own folder, as `rwkvflow up` starts it
            return self._main / "mlartifacts" / location.path.lstrip("/")
        return None


def peek(uri: str, run_id: str) -> dict[str, str] | None:
    """The tags of a run, asked for without importing MLflow; None if that can't be done or the run is not there.

    A deleted run has the tag "deleted".
    """
    try:
        if uri.startswith("sqlite:///"):
            with _reading(uri) as database:
                runs = database.execute("SELECT lifecycle_stage FROM runs WHERE run_uuid = ?", (run_id,)).fetchall()
                rows = database.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run_id,)).fetchall()
            stage = runs[0][0]
        elif uri.startswith(("http://", "https://")):
            run = _asked(uri, "runs/get", run_id=run_id)["run"]
            rows = [(tag["key"], tag["value"]) for tag in run["data"].get("tags", [])]
            stage = run["info"]["lifecycle_stage"]
        else:
            return None
    except (OSError, sqlite3.Error, ValueError, LookupError):
        return None
    return dict(rows) | ({"deleted": "true"} if stage == "deleted" else {})


def peek_model(uri: str, name: str) -> dict[str, str] | None:
    """The tags of a registered model, as `peek` gets those of a run; None if that can't be done or it is not there."""
    try:
        if uri.startswith("sqlite:///"):
            with _reading(uri) as database:
                query = "SELECT key, value FROM registered_model_tags WHERE name = ?"
                return dict(database.execute(query, (name,)).fetchall())
        if uri.startswith(("http://", "https://")):
            model = _asked(uri, "registered-models/get", name=name)["registered_model"]
            return {tag["key"]: tag["value"] for tag in model.get("tags", [])}
    except (OSError, sqlite3.Error, ValueError, LookupError):
        pass
    return None


def _reading(uri: str) -> contextlib.closing[sqlite3.Connection]:
    """MLflow's SQLite file, to be read from."""
    path = urllib.parse.quote(uri.removeprefix("sqlite:///"))
    return contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=_PROBE_SECONDS))


def _asked(uri: str, what: str, **query: str) -> dict[str, Any]:
    """What an MLflow server answers."""
    address = f"{without_password(uri).rstrip('/')}/api/2.0/mlflow/{what}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(
        urllib.request.Request(address, headers=_credentials(uri)), timeout=_PROBE_SECONDS
    ) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def without_password(uri: str) -> str:
    """The address as it may be shown and stored."""
    parts = urllib.parse.urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _credentials(uri: str) -> dict[str, str]:
    """The header of a request to a server that asks who it is, as MLflow's own client makes it."""
    user, word = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    given = urllib.parse.unquote(urllib.parse.urlsplit(uri).netloc.rpartition("@")[0]) or (
        f"{user}:{word}" if user and word else ""
    )
    return {"Authorization": f"Basic {base64.b64encode(given.encode()).decode()}"} if given else {}


def _probe(uri: str) -> None:
    """Find out within 3 s that nobody answers: MLflow would need its import, a timeout and a retry for it."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{without_password(uri).rstrip('/')}/health", timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # an answer, if not of the expected kind: MLflow finds out
    except OSError as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLError):
            return  # ditto
        reason = getattr(cause, "strerror", None) or str(cause)
        raise WorldError(f"MLflow at {without_password(uri)}", f"did not answer ({reason})", "start it") from error


def _is_local(uri: str) -> bool:
    return uri.startswith("sqlite:")


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _short(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _parsed(text: str | None) -> dict[str, str]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _same(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)
