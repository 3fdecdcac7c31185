"""MLflow as a view of the outputs: it can be rebuilt from them at any time, and losing it stops nothing.

The record and the metrics are files (tasks/record.py, metrics.jsonl). `Live` copies them to MLflow during a training,
`publish` brings MLflow up to date with everything that lies in the outputs. What can't be sent now is sent later.
"""

import contextlib
import hashlib
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from filelock import FileLock, Timeout

from rwkv_core.config import TrackingConfig
from rwkv_core.errors import Interrupted, Problem, WorldError
from rwkv_core.files import sha256
from tasks import mirror, registry, stage
from tasks.mlflow_run import (
    CURVE_TAG,
    DATABASE,
    MIRROR_TAG,
    Ledger,
    Server,
    import_mlflow,
    peek,
    peek_model,
    without_password,
)
from tasks.record import FILE, RunRecord, Status, main_root
from tasks.registry import CANDIDATE, CHAMPION, Registry, Version

if TYPE_CHECKING:
    from mlflow.entities import Run

RUNS = Path(".rwkvflow/runs")
"""Run folders, below the main checkout."""

_LIVE_LOCK = "live.lock"
_SEND_SECONDS, _PATIENT_SECONDS = 2.0, 30.0  # between two attempts to send; at most, while nobody answers
_SAMPLE_SECONDS = 5.0
_LEAVE_SECONDS = 10.0
_FORMAT = 1  # of what `publish` writes: another number makes it write everything again


def uri(root: Path | None = None) -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI, or a SQLite file in the main checkout.

    Args:
        root: a checkout; the current folder if None.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{main_root(root or Path.cwd()) / DATABASE}"


def load_libraries() -> None:
    """Import what `Live` will: who asks afterwards how much memory this process has taken is told of that too."""
    with contextlib.suppress(Exception):  # MLflow can't be imported, as the sender will say
        import_mlflow()
        if uri().startswith("sqlite"):
            importlib.import_module("mlflow.store.tracking.sqlalchemy_store")


class Live:
    """The metrics of a training in progress: into metrics.jsonl at once, to MLflow within seconds.

    Nothing here waits for MLflow but leaving, which does so for at most 10 s. The record's status becomes "running"
    on entering, and on leaving what the exception says, unless the caller wrote another one meanwhile. A training that
    is continued logs some steps again: the first values stay.

    Args:
        folder: run folder, with its run.json; <main>/.rwkvflow/runs/<digest>.
        tracking: names in MLflow.

    Raises:
        FileNotFoundError: the folder holds no record.
        OSError: the metrics can't be written: a full disk, on entering or on logging.
    """

    def __init__(self, folder: Path, tracking: TrackingConfig) -> None:
        self._folder, self._tracking = folder.resolve(), tracking
        self._main = self._folder.parents[len(RUNS.parts)]
        self._writing = threading.Lock()
        self._leaving = threading.Event()
        self._last: dict[str, int] = {}
        self._warned = False
        self._alive = FileLock(self._folder / _LIVE_LOCK, thread_local=False)

    def __enter__(self) -> Self:
        record = RunRecord.read(self._folder)
        with contextlib.suppress(Timeout):
            self._alive.acquire(timeout=0)  # tells `publish` that this run is not one that was killed
        record.model_copy(update={"status": "running", "finished": None}).write(self._folder)
        self._file = self._open()
        self._uri = uri(self._main)
        self._sender = threading.Thread(target=self._send, name="mlflow", args=(record,), daemon=True)
        self._sampler = threading.Thread(target=self._sample, name="system metrics", daemon=True)
        self._sender.start()
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # a full disk may be what the stage is failing with: this must not hide it
            with contextlib.suppress(OSError, Problem):
                record = RunRecord.read(self._folder)
                if record.status == "running":
                    end = {"status": _status(error), "finished": time.time()}
                    record.model_copy(update=end).write(self._folder)
            self._leaving.set()
            with self._writing:
                self._file.close()
            self._sender.join(_LEAVE_SECONDS)
            if self._sender.is_alive():
                self._warn("did not answer (in time)")
        finally:
            self._leaving.set()
            self._alive.release()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step.

        Args:
            step: optimizer step.
            metrics: by name: train/loss, train/lr, valid/loss, ...
        """
        with self._writing:
            new = {key: float(value) for key, value in metrics.items() if step > self._last.get(key, -1)}
            if not new or self._file.closed:
                return
            self._last.update(dict.fromkeys(new, step))
            row = {"time": int(time.time() * 1000), "step": step, "metrics": new}
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def _open(self) -> TextIO:
        """Open metrics.jsonl to go on after its last whole line, and learn which steps it has."""
        path = self._folder / mirror.LIVE
        whole = 0
        with contextlib.suppress(FileNotFoundError):
            for end, points in mirror.live_points(path, 0):
                whole = end
                self._last.update({point.name: max(point.step, self._last.get(point.name, -1)) for point in points})
            os.truncate(path, whole)
        return path.open("a", encoding="utf-8")

    def _send(self, record: RunRecord) -> None:
        server: Server | None = None
        ledger = Ledger(self._main, record.id)
        path = self._folder / mirror.LIVE
        run, pause, last = None, 0.0, False
        while not last:
            last = self._leaving.wait(pause)
            try:
                server = server or Server(self._uri, self._main, self._tracking)
                with ledger.lock(_PATIENT_SECONDS):
                    if run is None:
                        run = server.find(record, ledger.server(self._uri)) or server.create(record, "live")
                        if run.info.lifecycle_stage == "deleted":
                            server.restore(run)
                        server.put_status(run, "running", None)
                        server.put_facts(run, record, {})
                        server.put_note(run, mirror.note(record, {}))
                    server.put_live(run, path, ledger)
                    if last:
                        now = RunRecord.read(self._folder)
                        server.put_facts(run, now, {})  # what was met on the way is known now
                        server.put_status(run, now.status, now.finished)
                        ledger.note(self._uri, status=now.status)
                pause = _SEND_SECONDS
            except Exception as error:  # whatever MLflow raises, the training goes on
                self._warn(_trouble(error))
                run, pause = None, min(max(pause, _SEND_SECONDS) * 2, _PATIENT_SECONDS)

    def _sample(self) -> None:
        try:
            collectors = _collectors()
        except Exception:  # MLflow can't be imported, as the sender says
            return
        step = 1 + max((at for key, at in self._last.items() if key.startswith("system/")), default=-1)
        pause = 1.0  # the first sample soon: a short run has one too
        while not self._leaving.wait(pause):
            pause = _SAMPLE_SECONDS
            with contextlib.suppress(Exception):
                values: dict[str, float] = {}
                for collector in collectors:
                    collector.collect_metrics()
                    values |= collector.aggregate_metrics()
                    collector.clear_metrics()
                self.log(step, {f"system/{key}": value for key, value in values.items()})
                step += 1

    def _warn(self, trouble: str) -> None:
        if not self._warned:
            self._warned = True
            warn(self._uri, trouble)


def publish(root: Path, tracking: TrackingConfig) -> None:
    """Make MLflow hold everything that the outputs and the run folders hold. Nothing new costs next to nothing.

    The run of the adapter in outputs/train gets its params, curves, lineage, final metrics and artifacts, and its
    merged model is registered; other trainings that left a run folder, failed ones too, get curves and status. Every
    version of the registry becomes one there, with its aliases. A run that was deleted in MLflow is left so, and a version
    too. Failing is a warning.

    Args:
        root: the checkout whose outputs these are.
        tracking: names in MLflow.
    """
    where = ""
    try:
        main = main_root(root)
        where = uri(root)
        view = _Publisher(main, where, tracking)
        folders = {}
        for path in sorted((main / RUNS).glob(f"*/{FILE}")):
            with contextlib.suppress(OSError, Problem):
                folders[RunRecord.read(path.parent).id] = path.parent
        if (root / "outputs" / "train" / FILE).exists():
            record = RunRecord.read(root / "outputs" / "train")
            view.outputs(record, root.resolve(), folders.get(record.id))
            others = [folder for run, folder in folders.items() if run != record.id]
        else:
            others = list(folders.values())
        for folder in others:
            view.folder(folder)
        view.registry(folders)
    except Exception as error:  # MLflow is a view: no trouble with it may fail a stage
        warn(where, _trouble(error))


def publish_sweep(
    root: Path, tracking: TrackingConfig, key: str, name: str, numbers: dict[str, float], files: list[Path], note: str
) -> None:
    """Let the run that a sweep's arms are nested under say what came of it. Failing is a warning.

    Args:
        root: the checkout.
        tracking: names in MLflow.
        key: the sweep's id.
        name: what people call it.
        numbers: metrics by name.
        files: stored as artifacts.
        note: for a person to read, in markdown.
    """
    try:
        server = Server(uri(root), main_root(root), tracking)
        run = server.sweep(key, name)
        server.put_numbers(run, numbers)
        server.put_files(run, {file.name: (file, sha256(file)) for file in files})
        server.put_note(run, note)
        server.put_status(run, "finished", None)
    except Exception as error:
        warn(uri(root), _trouble(error))


class _Publisher:
    """Brings one server up to date; MLflow is imported when the first run needs it."""

    def __init__(self, main: Path, where: str, tracking: TrackingConfig) -> None:
        self._main, self._uri, self._tracking = main, where, tracking
        self.versions = Registry(main)
        self._connection: Server | None = None

    def outputs(self, record: RunRecord, root: Path, folder: Path | None) -> None:
        """Publish the run that the outputs are of.

        Args:
            record: outputs/train/run.json.
            root: the checkout.
            folder: the run's folder, if this machine has it.
        """
        if folder is not None and _is_live(folder):
            return  # being trained on right now: its own process sends what there is
        if record.status == "running":  # as it was when the train stage copied it, about to finish
            record = record.model_copy(update={"status": "finished"})
        ledger = Ledger(self._main, record.id)
        with ledger.lock(60):
            hashes = _hashes(root, ledger)
            parts = mirror.current_parts(root, record, **hashes)
            files = {place: (path, ledger.digest(path)) for place, path in mirror.files(root, parts).items()}
            if "merged" in parts and not root.is_relative_to(self.versions.folder):
                self.versions.register(root, record, hashes, files, ledger.digest)
            curve = folder / mirror.LIVE if folder is not None and (folder / mirror.LIVE).exists() else None
            wanted = self._digest(record, parts, hashes, files, curve)
            held = self._peek(ledger)
            if held is not None and held.get(MIRROR_TAG) == wanted:
                return
            ledger.save()
            if held is not None and "deleted" in held:
                print(f"MLflow run of {mirror.name(record)} was deleted there and is left so", file=sys.stderr)
                return
            server = self._server()
            run = server.find(record, ledger.server(self._uri))
            if run is None:
                run = server.create(record, "live" if curve else "tables")
            elif run.info.lifecycle_stage == "deleted":
                ledger.note(self._uri, run=run.info.run_id)
                return
            if curve is not None and run.data.tags.get(CURVE_TAG) != "tables":
                server.put_live(run, curve, ledger)
            else:
                server.put_tables(run, mirror.table_points(root / "outputs" / "train", record))
            numbers = mirror.metrics(root, parts)
            counts = mirror.read_json(root / "outputs" / "data" / "metrics.json") if "data" in parts else {}
            server.put_facts(run, record, counts)
            server.put_numbers(run, numbers)
            server.put_files(run, files)
            server.put_note(run, mirror.note(record, numbers))
            server.put_status(run, record.status, record.finished)
            server.put_tags(run, {MIRROR_TAG: wanted})
            ledger.note(self._uri, run=run.info.run_id, status=record.status)

    def folder(self, folder: Path) -> None:
        """Publish a run of which there is only the folder: failed, killed, or its outputs made room for others."""
        record = RunRecord.read(folder)
        curve = folder / mirror.LIVE
        if not curve.exists() or _is_live(folder):
            return
        if record.status == "running":  # nobody holds its lock: the process died without a word
            last = max((points[-1].time for _, points in mirror.live_points(curve, 0) if points), default=0)
            record = record.model_copy(update={"status": "killed", "finished": last / 1000 or record.started})
        ledger = Ledger(self._main, record.id)
        with ledger.lock(60):
            known = ledger.server(self._uri)
            complete = known.get("offset") == curve.stat().st_size and known.get("status") == record.status
            held = self._peek(ledger)
            if held is not None and (complete or "deleted" in held):
                return
            server = self._server()
            run = server.find(record, known) or server.create(record, "live")
            if run.info.lifecycle_stage == "deleted":
                ledger.note(self._uri, run=run.info.run_id)
                return
            if run.data.tags.get(CURVE_TAG) != "tables":
                server.put_live(run, curve, ledger)
            server.put_facts(run, record, {})
            if "mlflow.note.content" not in run.data.tags:
                server.put_note(run, mirror.note(record, {}))
            server.put_status(run, record.status, record.finished)
            ledger.note(self._uri, run=run.info.run_id, status=record.status, offset=curve.stat().st_size)

    def registry(self, folders: Mapping[str, Path]) -> None:
        """Publish the versions and which are the champion and the candidate; runs that MLflow has lost, with them.

        Args:
            folders: run folders, by their records' ids.
        """
        versions = self.versions.versions()
        if not versions:
            return
        champion, candidate = self.versions.champion(), self.versions.candidate()
        aliases = {CHAMPION: champion, CANDIDATE: candidate}
        verdicts = {version.key: registry.verdict(version) for version in versions}
        what = [_FORMAT, [v.model_dump() for v in versions], verdicts, [a and a.key for a in aliases.values()]]
        wanted = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        tag = f"{MIRROR_TAG}.{hashlib.sha256(str(self._main).encode()).hexdigest()[:12]}"  # one server has many's
        ledger = Ledger(self._main, "registry")
        with ledger.lock(60):
            if (peek_model(self._uri, self._tracking.registered_model) or {}).get(tag) == wanted:
                return
            server = self._server()
            tags, there = server.registered_model()
            known = ledger.server(self._uri) if tag in tags else {}  # else the server is new, or has lost all
            sent = self._put_versions(server, versions, folders, known.get("versions", {}))
            numbers = {key: number for key, (number, _) in sent.items()}
            moved = dict(known.get("aliases", {}))
            for alias, version in aliases.items():
                # another machine's registry may have moved it since: only what was changed here is moved here
                if version and version.key in numbers and (moved.get(alias) != version.key or alias not in there):
                    server.put_alias(alias, numbers[version.key])
                    moved[alias] = version.key
            server.put_model_tag(tag, wanted)
            ledger.note(self._uri, versions={**known.get("versions", {}), **sent}, aliases=moved)

    def _put_versions(
        self, server: Server, versions: Sequence[Version], folders: Mapping[str, Path], known: Mapping[str, Any]
    ) -> dict[str, tuple[str, str]]:
        """Bring the versions up to date; by each one's key its number there and a digest of what was sent, but for those
        deleted there.

        Args:
            server: where.
            versions: those of the registry.
            folders: run folders, by their records' ids.
            known: what this gave before.
        """
        sent = {}
        there = server.versions()
        for version in versions:
            digests = {
                "adapter": version.files.get(stage.ADAPTER.as_posix()), "merged": version.merged, "state": version.state
            }  # fmt: skip
            found = there.get((version.merged, version.state))
            if found is None and version.key in known:
                continue  # a person has deleted it
            verdict = registry.verdict(version)
            what = json.dumps([_FORMAT, version.model_dump(), verdict], sort_keys=True)
            digest = hashlib.sha256(what.encode()).hexdigest()
            if found is not None and known.get(version.key, ("", ""))[1] == digest:
                sent[version.key] = str(found.version), digest
                continue
            run = self._run_of(server, version, folders)
            if run.info.lifecycle_stage == "deleted":
                continue
            parts = mirror.current_parts(version.folder, version.record, **digests)
            tags = mirror.version_tags(version.record, version.folder, parts, digests)
            tags |= mirror.verdict_tags(verdict)
            about = mirror.note(version.record, mirror.metrics(version.folder, parts)).partition("\n")[0]
            files = sorted((version.folder / stage.MERGED).glob("*.pth"))
            sent[version.key] = server.put_version(run, found, files, tags, about), digest
        return sent

    def _run_of(self, server: Server, version: Version, folders: Mapping[str, Path]) -> "Run":
        """The run that made a version; one that the server has lost is written again."""
        record = version.record
        ledger = Ledger(self._main, record.id)
        with ledger.lock(60):
            run = server.find(record, ledger.server(self._uri))
        if run is None:
            self.outputs(record, version.folder, folders.get(record.id))
            run = server.find(record, {})
        if run is None:
            raise Timeout(f"the run of {version.key}, which is training again")
        return run

    def _peek(self, ledger: Ledger) -> dict[str, str] | None:
        known = ledger.server(self._uri).get("run")
        return peek(self._uri, known) if known else None

    def _server(self) -> Server:
        if self._connection is None:
            self._connection = Server(self._uri, self._main, self._tracking)
        return self._connection

    def _digest(
        self,
        record: RunRecord,
        parts: list[str],
        hashes: dict[str, str | None],
        files: dict[str, tuple[Path, str]],
        curve: Path | None,
    ) -> str:
        """Of everything that `outputs` would write."""
        stored = {place: digest for place, (_, digest) in files.items()}
        size = curve.stat().st_size if curve is not None else None
        what = [_FORMAT, record.model_dump(mode="json"), self._tracking.model_dump(), parts, hashes, stored, size]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def warn(where: str, trouble: str) -> None:
    """Say on stderr that MLflow lacks something and how it gets it."""
    rest = "the run is whole without it; `rwkvflow sync` writes what is missing"
    print(f"MLflow at {without_password(where)} {trouble}; {rest}", file=sys.stderr, flush=True)


class _Collector(Protocol):
    """As mlflow.system_metrics.metrics.BaseMetricsMonitor."""

    def collect_metrics(self) -> None: ...
    def aggregate_metrics(self) -> dict[str, float]: ...
    def clear_metrics(self) -> None: ...


def _collectors() -> list[_Collector]:
    """MLflow's own, for its UI knows their names; the GPU's where it has one and nvidia-ml-py is installed."""
    import_mlflow()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    collectors: list[_Collector] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with contextlib.suppress(Exception):  # no such device, no library for it
            collectors.append(kind())
    return collectors


def _hashes(root: Path, ledger: Ledger) -> dict[str, str | None]:
    """sha256 of adapter, merged model and tuned state; of the model, gigabytes, from its receipt where that says it."""
    adapter, merged, state = root / stage.ADAPTER, root / stage.MODEL, stage.mounted(root)
    receipt = mirror.flat(mirror.read_json(merged.parent / "receipt.json"))
    return {
        "adapter": ledger.digest(adapter) if adapter.exists() else None,
        "merged": (receipt.get("merged.sha256") or ledger.digest(merged)) if merged.exists() else None,
        "state": ledger.digest(state) if state is not None else None,
    }


def _is_live(folder: Path) -> bool:
    lock = FileLock(folder / _LIVE_LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _status(error: BaseException | None) -> Status:
    if error is None:
        return "finished"
    return "killed" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"


def _trouble(error: BaseException) -> str:
    """What MLflow did, in words: it did not answer, it refused, or it is not to blame."""
    if isinstance(error, WorldError):
        return error.rule
    if isinstance(error, Timeout):
        return "was not asked (another process is writing this run)"
    reason = (str(error).rpartition("(Caused by ")[2].strip().splitlines() or [""])[0][:200] or type(error).__name__
    code = getattr(error, "error_code", None)
    if code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE") or isinstance(error, OSError):
        return f"did not answer ({reason})"  # MLflow gives a failed connection the code of an error inside the server
    return f"refused ({reason})" if code else f"was not brought up to date ({type(error).__name__}: {reason})"
