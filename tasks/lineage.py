"""What a model was made from, by the hashes in files: merge, adapters, base, data down to the rows, code, settings, who ran it.

Each step names the next by its sha256, and is looked up in the registry, in the checkout's outputs, and in files beside. Where
there is none, that is said.
"""

import csv
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_core.data.binidx import SIDES, Documents
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.tokenizer import named
from tasks import mirror, registry, stage, tracking
from tasks.record import RunRecord, main_root
from tasks.registry import CANDIDATE, CHAMPION, Registry, Version

Facts = dict[str, Any]

_SHOWN = 10  # files of a source


class Lineage(NamedTuple):
    """A model's way back."""

    steps: Facts
    """model, merge, base and adapters, of which each has training and data; nested, for JSON."""
    rows: dict[str, tuple[Path, RunRecord]]
    """Of each adapter whose rows are kept: the folder of the token files, and the training."""


class _Place(NamedTuple):
    """A folder laid out as a checkout is."""

    folder: Path
    name: str
    adapter: str | None
    """sha256 of its adapter."""


def trace(root: Path, model: str) -> Lineage:
    """Walk a model back.

    Args:
        root: the checkout.
        model: a file, or a folder; or number, alias or hash of a version.

    Raises:
        InputError: there is no such file or version.
    """
    walk = _Walk(root)
    path = root / model
    if not path.exists():
        return walk.version(walk.registry.find(model))
    return walk.file(path, model)


def rows(found: Lineage) -> Iterator[Facts]:
    """The documents that a model's adapters were trained and judged on, as they were tokenized.

    Raises:
        InputError: none are kept.
    """
    if not found.rows:
        raise InputError("the model's rows", "are not kept here", "look at its source files: rwkvflow lineage MODEL")
    for adapter, (folder, record) in found.rows.items():
        data = record.params["data"]
        tokenizer = named(data["tokenizer"], data["special_tokens"])
        for side in SIDES:
            documents = Documents(folder / side)
            for i in range(len(documents)):
                yield {
                    "adapter": adapter[:16],
                    "side": side,
                    "document": i,
                    "tokens": len(documents[i]),
                    "learned": int(documents.learned(i).sum()),
                    "text": tokenizer.decode(documents[i][:-1].tolist()),
                }


def lines(found: Lineage) -> Iterator[str]:
    """The steps for a person to read; settings and long lists are left to JSON."""
    yield from _lines(found.steps, "")


class _Walk:
    def __init__(self, root: Path) -> None:
        self.root, self.main = root, main_root(root)
        self.registry = Registry(self.main)
        self.versions = self.registry.versions()
        adapter = root / stage.ADAPTER
        self.outputs = _Place(root, "this checkout's outputs", sha256(adapter) if adapter.exists() else None)
        self.rows: dict[str, tuple[Path, RunRecord]] = {}

    def version(self, version: Version, given: Facts | None = None) -> Lineage:
        """Of a registered one."""
        place = _place(version)
        model: Facts = given or {"path": str(version.model), "sha256": version.merged}
        candidate, changes = self.registry.candidate(), self.registry.changes()
        with suppress(Exception):  # a champion whose files are gone is nothing to stop at
            champion = self.registry.champion()
            found = [
                alias for alias, one in ((CHAMPION, champion), (CANDIDATE, candidate)) if one and one.key == version.key
            ]
            model["aliases"] = ", ".join(found) or "none"
        model |= {"version": version.number, "key": version.key}
        if version.state:
            model["tuned state"] = version.state
        verdict = registry.verdict(version)
        model["gate"] = (
            f"{'passed' if verdict['passed'] else 'refused'} {verdict['time']}" if verdict else "not asked yet"
        )
        model["was champion"] = sum(change.version == version.key for change in changes)
        return self._merged(place, model)

    def file(self, path: Path, name: str) -> Lineage:
        """Of any file: one that a version has, or this checkout's outputs; one with a receipt beside it; an adapter."""
        digest = sha256(path)
        model: Facts = {"path": name, "sha256": digest}
        for version in self.versions:
            what = _made(_place(version), digest)
            if what:
                return self.version(version, model | {"is": what})
        what = _made(self.outputs, digest)
        if what:
            return self._merged(self.outputs, model | {"is": what})
        receipt = path.with_name(f"{path.name}.receipt.json")
        values = mirror.read_json(receipt)
        if values.get("merged", {}).get("sha256") == digest:
            return self._of_receipt(model, receipt, values, name)
        if values:
            model["receipt"] = f"{receipt} is of another file"
        about = _record_in(path)
        if about is not None:
            adapter = self._adapter({"sha256": digest, "path": name}, None)
            return Lineage({"model": model | {"is": "an adapter"}, "adapters": [adapter]}, self.rows)
        model["made from"] = "not known: no version, output or receipt here names this hash"
        return Lineage({"model": model}, {})

    def _merged(self, place: _Place, model: Facts) -> Lineage:
        receipt = place.folder / stage.MERGED / "receipt.json"
        values = mirror.read_json(receipt)
        if not values:
            adapter = place.folder / stage.ADAPTER
            entry = self._adapter({"path": str(adapter), "sha256": place.adapter}, place)
            return Lineage({"model": model, "merge": "none is recorded", "adapters": [entry]}, self.rows)
        return self._of_receipt(model, receipt, values, place.name, place)

    def _of_receipt(
        self, model: Facts, receipt: Path, values: Facts, name: str, place: _Place | None = None
    ) -> Lineage:
        adapters = [self._adapter(entry, place) for entry in values["adapters"]]
        bases = [entry["training"].pop("base") for entry in adapters if "base" in entry["training"]]
        base = values["base"] | next((base for base in bases if base["sha256"] == values["base"]["sha256"]), {})
        path = self.root / str(base.get("path", ""))
        base["is"] = _state(path, base["sha256"])
        merge = {"of": name, "receipt": str(receipt), "receipt's sha256": sha256(receipt), **values["merged"]}
        steps = {"model": model, "merge": merge, "base": base, "adapters": adapters}
        return Lineage(steps, self.rows)

    def _adapter(self, entry: Mapping[str, Any], place: _Place | None) -> Facts:
        """An adapter by its hash, as a receipt names it, with its training."""
        digest = str(entry["sha256"])
        facts: Facts = {key: entry[key] for key in ("sha256", "kind", "weight", "quantize") if key in entry}
        places = [*([place] if place else []), *map(_place, self.versions), self.outputs]
        found = next((p for p in places if p.adapter == digest), None)
        path = found.folder / stage.ADAPTER if found else self.root / str(entry.get("path", ""))
        about = _record_in(path) if _same(path, digest) else None
        facts["file"] = str(path) if about else "not here"
        if found:
            facts["training"] = self._training(RunRecord.read(found.folder / stage.TRAIN))
            facts["data"] = self._data(found, digest)
        elif about is not None:
            facts |= self._elsewhere(about)
        else:
            run = entry.get("run")
            facts["training"] = {"run": run or "not known: the adapter has no record"}
        if about is not None:
            facts["kind"], facts["settings"] = about.adapter.kind, about.adapter.model_dump(mode="json")
            if about.loaded:
                facts["began from"] = self._adapter({"sha256": about.loaded}, None)
        return facts

    def _elsewhere(self, about: Any) -> Facts:
        """Of an adapter that is in no outputs here: what its own record says, and the run's folder, if it is still there."""
        folder = self.main / tracking.RUNS / str(about.run).partition("@")[0]
        data: Facts = {"sha256": about.data_sha256 or "not known", "rows kept": "no"}
        training: Facts = {"run": about.run or "not known", "base": {"sha256": about.base_sha256}}
        with suppress(OSError, InputError):
            record = RunRecord.read(folder)
            training, data = self._training(record), {**record.data, "rows kept": "no"}
        return {"training": training, "data": data}

    def _training(self, record: RunRecord) -> Facts:
        git = record.git
        return {
            "run": record.id,
            "digest": record.digest,
            "git commit": git.get("commit") or "none: not in a repository",
            "uncommitted changes": git.get("dirty"),
            "DVC experiment": record.dvc_experiment.get("name") or "none",
            "flow run": record.prefect.get("flow_run") or "none",
            "flow run's name": record.prefect.get("flow_run_name") or "none",
            "started": _time(record.started),
            "finished": _time(record.finished),
            "host": record.host,
            "versions": record.versions,
            "base": record.base,
            "params": record.params,
        }

    def _data(self, place: _Place, adapter: str) -> Facts:
        """The rows that were learned and held out: how many, of which files, and whether they are kept."""
        record = RunRecord.read(place.folder / stage.TRAIN)
        folder = place.folder / stage.DATA
        facts: Facts = {key: value for key, value in record.data.items() if key != "files"}
        named_files = record.data.get("files", {})
        kept = bool(named_files) and all(_same(folder / name, sha) for name, sha in named_files.items())
        facts["rows kept"] = str(folder) if kept else "no: other rows lie there now, or none"
        facts["token files"] = named_files or "not known"
        if kept:
            self.rows[adapter] = (folder, record)
            manifest = mirror.read_json(folder / "manifest.json")
            if manifest:
                facts["manifest"] = {"path": str(folder / "manifest.json"), "sha256": sha256(folder / "manifest.json")}
                for side in SIDES:
                    facts[side] = {key: manifest[side][key] for key in ("documents", "tokens", "learned")}
                facts["held out by"] = manifest["holdout"]["group"] or "text"
            facts["source files"] = list(
                self._files(folder / "files.csv", self.root / str(record.data.get("path", "")))
            )
        return facts

    def _files(self, table: Path, source: Path) -> Iterator[Facts]:
        with suppress(OSError), table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                path = source if source.is_file() else source / row["file"]
                there = path.exists() and (row["kind"] == "binidx" or path.stat().st_size == int(row["bytes"]))
                yield {**row, "now": "there, of the same size" if there else "gone or changed"}


def _place(version: Version) -> _Place:
    return _Place(version.folder, f"version {version.number}", version.files.get(stage.ADAPTER.as_posix()))


def _made(place: _Place, digest: str) -> str | None:
    """What of a checkout's outputs has this hash."""
    folder = place.folder
    receipt = mirror.read_json(folder / stage.MERGED / "receipt.json")
    if receipt.get("merged", {}).get("sha256") == digest:
        return "the merged model"
    if any(entry.get("sha256") == digest for entry in receipt.get("states", {}).values()):
        return "the tuned state"
    if place.adapter == digest:
        return "the adapter"
    for form, entry in mirror.read_json(folder / stage.EXPORT / "conformance.json").get("formats", {}).items():
        if entry.get("sha256") == digest:
            return f"the export as {form}"
        if entry.get("state", {}).get("sha256") == digest:
            return f"the tuned state as {form}"
    return None


def _time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else "not known"


def _same(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def _state(path: Path, digest: str) -> str:
    if not path.exists():
        return "not here"
    return "here" if sha256(path) == digest else "another file by now"


def _record_in(path: Path) -> Any:
    from rwkv_core.adapters import file  # imports torch

    return file.read_record(path) if path.is_file() else None


def _lines(facts: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in facts.items():
        if name in ("params", "settings", "versions", "token files") and isinstance(value, Mapping):
            yield f"{indent}{name}: {len(value)}, see --json"
        elif isinstance(value, Mapping):
            yield f"{indent}{name}:"
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, list):
            for number, entry in enumerate(value[:_SHOWN], 1):
                yield f"{indent}{name} {number} of {len(value)}:"
                yield from _lines(entry, f"{indent}  ")
        else:
            yield f"{indent}{name}: {value}"
