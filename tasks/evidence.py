"""What the report says beside the measures: what was trained on what, and where it comes from. Read from outputs."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from rwkv_core.files import sha256
from rwkv_core.report import Evidence, Facts
from rwkv_core.texts import TEXTS as T
from rwkv_core.texts import Text, joined
from rwkv_core.verdict import size, time
from tasks import mirror, stage
from tasks.record import RunRecord

FILES = ("metrics.json", "positions.csv", "documents.csv", "samples.json")
"""Of outputs/evaluate, from which the report is made."""


def evidence(root: Path, evaluated: Path) -> Evidence:
    """All that a report shows.

    Args:
        root: a checkout, or the folder of a registered version.
        evaluated: where `FILES` are; positions.csv may be missing.
    """
    train = root / stage.TRAIN
    record = RunRecord.read(train)
    measured = mirror.read_json(train / "metrics.json")
    adapter = root / stage.ADAPTER
    cost = {
        "steps": int(measured["steps"]),
        "tokens": int(measured["tokens"]),
        "seconds": record.seconds_trained,
        "bytes": adapter.stat().st_size,
    }
    positions = evaluated / "positions.csv"
    return Evidence(
        comparison=mirror.read_json(evaluated / "metrics.json"),
        train=_curve(train / "history.csv"),
        valid=_curve(train / "valid.csv"),
        positions=[{name: float(x) for name, x in row.items()} for row in _rows(positions)]
        if positions.exists()
        else [],
        documents=_documents(evaluated / "documents.csv"),
        samples=_samples(evaluated / "samples.json"),
        facts=facts(root, record),
        lineage=lineage(root, record),
        cost=cost,
    )


def lineage(root: Path, record: RunRecord) -> list[tuple[Text, object]]:
    """Hashes of what a model came from, and what is said of its training.

    Args:
        root: as of `evidence`.
        record: of the training.
    """
    merge, git, state = root / stage.MERGED / "receipt.json", record.git, stage.mounted(root)
    receipt = mirror.read_json(merge)
    commit: object = git.get("commit") or T["no_commit"]
    found = {
        "base_hash": record.base.get("sha256"),
        "data_hash": record.data.get("sha256"),
        "adapter_hash": ", ".join(f"{entry['sha256']} ({entry.get('kind')})" for entry in receipt.get("adapters", [])),
        "receipt_hash": sha256(merge) if merge.exists() else None,
        "tuned_hash": receipt.get("merged", {}).get("sha256"),
        "state_hash": sha256(state) if state else None,
        "commit": T["changed"](commit=commit) if git.get("dirty") else commit,
        "experiment": record.dvc_experiment.get("name"),
        "run": record.digest,
        "host": record.host,
        "versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
    }
    return [(T[name], value) for name, value in found.items() if value]


def facts(root: Path, record: RunRecord) -> Facts:
    """Tables of the data, the model and its training. A value that is a file's or folder's name is a path."""
    manifest, measured = mirror.read_json(root / stage.MANIFEST), mirror.read_json(root / stage.TRAIN / "metrics.json")
    tables = [(T["data"], list(_data(manifest)))] if manifest else []  # a version's rows may be gone
    return [*tables, (T["model"], list(_model(record))), (T["settings"], list(_training(record, measured)))]


def _data(manifest: Mapping[str, Any]) -> Iterator[tuple[Text, object]]:
    yield T["source"], PurePath(manifest["source"]["path"])
    yield T["rows"], f"{manifest['source']['rows']:,}"
    for name, side in (("trained_on", "train"), ("held_out_of", "valid")):
        count = {key: f"{manifest[side][key]:,}" for key in ("documents", "tokens")}
        yield T[name], T["documents_tokens"](**count)
    yield T["split_by"], manifest["holdout"]["group"] or T["text"]


def _model(record: RunRecord) -> Iterator[tuple[Text, object]]:
    base = record.base
    yield T["base_file"], PurePath(base["path"])
    if "n_layer" in base:
        yield T["shape"], T["shape_is"](version=base["version"], layers=base["n_layer"], width=base["n_embd"])


def _training(record: RunRecord, measured: Mapping[str, Any]) -> Iterator[tuple[Text, object]]:
    adapter, train, model = (record.params[section] for section in ("adapter", "train", "model"))
    optimizer = train["optimizer"]
    passed_over = ("kind", "targets", "also", "layers", "state", "load", "load_init")
    settings = {name: value for name, value in adapter.items() if name not in passed_over}
    yield T["method"], ", ".join([adapter["kind"], *words(settings)])
    parts = [Text.same(name) for name in (*adapter.get("targets", ()), *adapter.get("also", ()))]
    if adapter["state"] != "none":
        parts.append(T["initial_state"](kind=adapter["state"]))
    yield T["trained"], T["trained_layers"](names=joined(parts), layers=adapter["layers"])
    yield T["frozen"], T["full"] if model["quantize"] == "none" else model["quantize"]
    yield T["begun"], PurePath(adapter["load"]) if adapter["load"] else T["own_values"]
    for name, text in (("epochs", "epochs"), ("steps", "steps"), ("tokens", "count_tokens")):
        if train[name] is not None:
            yield T["length"], T[text](count=f"{train[name]:g}" if name == "epochs" else f"{train[name]:,}")
    carried = [T["state_carried"]] if train["carry_state"] else []
    yield T["row_making"], joined([Text.same(train["rows"]), *carried, Text.same(train["order"])])
    yield T["tokens_a_step"], f"{train['ctx_len'] * train['micro_batch'] * train['accumulate']:,}"
    rate = {"first": f"{optimizer['lr']:g}", "last": f"{optimizer['lr_final']:g}", "schedule": optimizer["schedule"]}
    yield T["rate"], T["rate_is"](**rate)
    yield T["seed"], record.params["seed"]
    yield T["time"], time(record.seconds_trained)
    if "peak_memory_mb" in measured:
        yield T["peak"], size(measured["peak_memory_mb"] * 2**20)


def words(settings: Mapping[str, Any]) -> Iterator[str]:
    """Numbers with their names, and switches that are on."""
    for name, value in settings.items():
        word = name.replace("_", " ")
        if isinstance(value, Mapping):
            yield from words(value)
        elif value is True:
            yield word
        elif value is not False and value is not None:
            yield f"{word} {value:g}" if isinstance(value, int | float) else f"{word} {value}"


def _curve(path: Path) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row["loss"])) for row in _rows(path)]


def _documents(path: Path) -> tuple[Any, Any]:
    table = list(_rows(path))
    base, tuned = (np.array([float(row[name]) for row in table]) for name in ("base_loss", "tuned_loss"))
    return base, tuned


def _samples(path: Path) -> list[dict[str, str]]:
    samples: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return samples


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
