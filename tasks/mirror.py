"""What a run's files say, in MLflow's words: params, tags, metrics, curves, lineage, note, artifacts. MLflow-free."""

import contextlib
import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_core.files import sha256
from tasks.record import FILE, RunRecord

LIVE = "metrics.jsonl"
"""Name of the live metrics in a run folder: a line a step, {"time": ms, "step": n, "metrics": {name: value}}."""

RUN_TAG = "rwkvflow.run"
"""The tag by which a record's run is found."""

_PARAM_LENGTH, _TAG_LENGTH, _KEY_LENGTH = 6000, 8000, 250  # mlflow/utils/validation.py
_DIGEST_LENGTH = 36  # of a dataset, ibid.
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MADE_FROM = re.compile(r"adapter|merged|model|tuned")


class Point(NamedTuple):
    """One value of one curve."""

    name: str
    value: float
    time: int
    """Milliseconds since 1970."""
    step: int


@dataclass(frozen=True)
class Lineage:
    """Something a run was made from."""

    name: str
    digest: str
    source: str
    context: str
    """Its part in the run: training, evaluation, base."""
    profile: str
    """JSON, facts such as rows and tokens."""


def params(record: RunRecord, counts: dict[str, Any]) -> dict[str, str]:
    """Every setting under its dotted name, and what is read from the files that they name: sizes, rows, tokens.

    Args:
        record: the run's.
        counts: outputs/data/metrics.json, or nothing.
    """
    sizes = {key: value for key, value in record.base.items() if key not in ("path", "sha256")}
    read = {f"base.{key}": value for key, value in sizes.items()} | {
        f"data.{key.replace('/', '.')}": count for key, count in _numbers(counts)
    }
    found = {**read, **flat(record.params)}
    return {_clean(key): _text(value)[:_PARAM_LENGTH] for key, value in found.items()}


def tags(record: RunRecord) -> dict[str, str]:
    """What links a run to everything else; what is unknown is left out."""
    git = record.git
    found = {
        RUN_TAG: record.id,
        "rwkvflow.digest": record.digest,
        "rwkvflow.base": record.base.get("sha256"),
        "rwkvflow.data": record.data.get("sha256"),
        "rwkvflow.adapter": record.params.get("adapter", {}).get("kind"),
        "rwkvflow.host": record.host,
        "git.commit": git.get("commit"),
        "git.branch": git.get("branch"),
        "git.dirty": git.get("dirty"),
        "incident": ", ".join(record.incidents) or None,
        "dvc.experiment": record.dvc_experiment.get("name"),
        "dvc.baseline": record.dvc_experiment.get("baseline"),
        "rwkvflow.sweep": record.sweep.get("name"),
        "prefect.flow_run": record.prefect.get("flow_run"),
        "prefect.flow_run_name": record.prefect.get("flow_run_name"),
        # MLflow's own names: the UI's columns "Source" and "Version" show these
        "mlflow.source.name": "dvc.yaml",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": git.get("commit"),
        "mlflow.source.git.branch": git.get("branch"),
        "rwkvflow.versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
    }
    return {key: _text(value)[:_TAG_LENGTH] for key, value in found.items() if value is not None}


def name(record: RunRecord) -> str:
    """What a person calls the run: its DVC experiment, its flow run, or its adapter and the start of its id."""
    given = record.dvc_experiment.get("name") or record.prefect.get("flow_run_name")
    adapter = record.params.get("adapter", {})
    size = f"-r{adapter['rank']}" if "rank" in adapter else ""
    return given or f"{adapter.get('kind', 'run')}{size}-{record.id[:6]}"


def lineage(record: RunRecord) -> list[Lineage]:
    """The data trained on, the data held out, and the base. The two sides have one source, and so one digest."""
    data, base = record.data, record.base
    rows = {"rows": data["rows"]} if "rows" in data else {}
    sides = [
        Lineage(
            f"{Path(_source(data)).stem}-{title}",
            str(data.get("sha256", ""))[:_DIGEST_LENGTH],
            _source(data),
            context,
            json.dumps({**rows, **({"tokens": data[side]} if side in data else {})}),
        )
        for side, title, context in (("train", "train", "training"), ("valid", "held-out", "evaluation"))
    ]
    sizes = {key: value for key, value in base.items() if key not in ("path", "sha256")}
    path = str(base.get("path", "base"))
    sha = str(base.get("sha256", ""))[:_DIGEST_LENGTH]
    return [entry for entry in (*sides, Lineage(Path(path).name, sha, path, "base", json.dumps(sizes))) if entry.digest]


def metrics(root: Path, parts: Iterable[str]) -> dict[str, float]:
    """The final numbers of the stages in `parts`, by name.

    A number of outputs/evaluate/metrics.json at a: {b: ...} is "evaluate/a/b"; the train stage's are "final/...", for
    "train/..." are the curves. Of lists only pairs are taken, as low and high of an interval.
    """
    files = {"train": ("final", "train/metrics.json"), "evaluate": ("evaluate", "evaluate/metrics.json")}
    found: dict[str, float] = {}
    for part, (prefix, file) in files.items():
        if part in parts:
            found |= {f"{prefix}/{key}": float(value) for key, value in _numbers(read_json(root / "outputs" / file))}
    return found


def note(record: RunRecord, numbers: dict[str, float]) -> str:
    """A paragraph and a table for a person, in markdown."""
    base, data, adapter = record.base, record.data, record.params.get("adapter", {})
    sizes = " x ".join(str(base[key]) for key in ("n_layer", "n_embd") if key in base)
    method = ", ".join(f"{key} {adapter[key]}" for key in ("rank", "alpha") if key in adapter)
    counts = {"rows": data.get("rows"), "tokens": data.get("train")}
    amounts = ", ".join(f"{count:,} {key}" for key, count in counts.items() if isinstance(count, int))
    base_facts = ", ".join(part for part in (f"RWKV-{base['version']}" if "version" in base else "", sizes) if part)
    lines = [
        f"**{adapter.get('kind', 'adapter')}**{f' ({method})' if method else ''}"
        f" on `{Path(str(base.get('path', 'base'))).name}`{f' ({base_facts})' if base_facts else ''},"
        f" taught `{Path(_source(data)).name}`{f' ({amounts})' if amounts else ''}"
        f"{f' in {_duration(record.seconds_trained)}' if record.seconds_trained else ''}.",
        "",
    ]
    sides = {
        side: {k.removeprefix(f"evaluate/{side}/"): v for k, v in numbers.items() if k.startswith(f"evaluate/{side}/")}
        for side in ("base", "tuned")
    }
    both = [key for key in sides["tuned"] if key in sides["base"] and "/" not in key]
    if both:
        lines += ["| held out | base | tuned |", "|---|---|---|"]
        lines += [f"| {key} | {sides['base'][key]:.4g} | {sides['tuned'][key]:.4g} |" for key in both]
        lines.append("")
    commit = record.git.get("commit")
    if commit:
        changed = ", with uncommitted changes" if record.git.get("dirty") else ""
        lines.append(f"Code: `{commit[:10]}` on {record.git.get('branch')}{changed}.")
    lines.append(f"Made on {record.host}.")
    return "\n".join(lines)[:_TAG_LENGTH]


def current_parts(
    root: Path, record: RunRecord, adapter: str | None, merged: str | None, state: str | None = None
) -> list[str]:
    """The stages whose outputs belong to the adapter that is there.

    After a new training the old merged model and the old report still lie there, until their own stages run; and new
    data may lie there that nothing was trained on yet, as its manifest's hashes tell. An output of the later stages
    that names the hashes of other models than these is such a leftover.

    Args:
        root: the checkout.
        record: the run's.
        adapter: sha256 of outputs/train/adapter.pth.
        merged: sha256 of outputs/merged/model.pth.
        state: sha256 of the tuned state beside it, if there is one. Where nothing else was trained, the merged model is the
            base, and the state alone tells what it is.
    """
    parts = ["train"]
    outputs = root / "outputs"
    data = {value for value in flat(read_json(outputs / "data" / "manifest.json")).values() if _is_hash(value)}
    if not data or data & {value for value in flat(record.data).values() if _is_hash(value)}:
        parts.append("data")
        if (outputs / "preview").is_dir():
            parts.append("preview")
    base = record.base.get("sha256")
    later = {adapter, merged} if state is None else {adapter, state}
    for part, makers in (("merged", {adapter}), ("evaluate", later), ("export", later)):
        named = set().union(*(made_from(file) for file in (outputs / part).glob("*.json"))) - {base}
        follows = part == "merged" or "merged" in parts or not (outputs / "merged").exists()
        if (outputs / part).is_dir() and follows and (not named or named & makers):
            parts.append(part)
    return parts


def made_from(path: Path) -> set[str]:
    """The sha256 digests of models that a JSON file names."""
    values = read_json(path)
    values |= {f"{key}.{i}": entry for key, x in values.items() if isinstance(x, list) for i, entry in enumerate(x)}
    return {value for key, value in flat(values).items() if _is_hash(value) and _MADE_FROM.search(key)}


def files(root: Path, parts: Iterable[str]) -> dict[str, Path]:
    """Files to keep as artifacts, by their name there. The merged model is not among them: it is a version's own."""
    wanted = {
        "data": ("manifest.json", "metrics.json", "lints.csv", "lengths.csv", "files.csv"),
        "preview": ("preview.html", "metrics.json"),
        "train": (
            "adapter.pth",
            FILE,
            "history.csv",
            "valid.csv",
            "train_log.txt",
            "saves/saves.csv",
            "metrics.json",
            "*.jsonl",
        ),
        "merged": ("receipt.json",),
        "evaluate": ("receipt.json", "metrics.json", "report.html", "report*.md", "samples.json", "*.csv", "*.svg"),
        "export": ("conformance.json", "conformance.md", "README.md"),
    }
    found = {f"pipeline/{file}": root / file for file in ("params.yaml", "dvc.yaml", "dvc.lock")}
    for part in parts:
        for pattern in wanted[part]:
            found |= {f"{part}/{path.name}": path for path in sorted((root / "outputs" / part).glob(pattern))}
    return {place: path for place, path in found.items() if path.is_file()}


def version_tags(record: RunRecord, root: Path, parts: Iterable[str], hashes: dict[str, str | None]) -> dict[str, str]:
    """What a person who picks a version wants to know of it.

    Args:
        record: the run's.
        root: the checkout, or the version's folder.
        parts: stages whose outputs belong to it.
        hashes: sha256 of "adapter", "merged" and "state".
    """
    parts = list(parts)
    found: dict[str, Any] = {
        RUN_TAG: record.id,
        "base.sha256": record.base.get("sha256"),
        "data.sha256": record.data.get("sha256"),
        "adapter.sha256": hashes["adapter"],
        "merged.sha256": hashes["merged"],
        "state.sha256": hashes["state"],
        "adapter.kind": record.params.get("adapter", {}).get("kind"),
        "git.commit": record.git.get("commit"),
        "dvc.experiment": record.dvc_experiment.get("name"),
        "prefect.flow_run": record.prefect.get("flow_run"),
    }
    for what, path in (("manifest", "data/manifest.json"), ("receipt", "merged/receipt.json")):
        whole = root / "outputs" / path
        if whole.parent.name in parts and whole.is_file():
            found[f"{what}.sha256"] = sha256(whole)
    for part, file in (("evaluate", "metrics.json"), ("export", "conformance.json")):
        if part in parts:
            values = flat(read_json(root / "outputs" / part / file))
            # the first two levels are the summary; deeper ones, such as the loss by position, are in the file
            found |= {f"{part}.{key}": value for key, value in values.items() if key.count(".") < 2}
            if part == "export":
                found["conforms"] = values.get("conformance.conforms")
    return {
        _clean(key): _text(value)[:_TAG_LENGTH]
        for key, value in found.items()
        if value is not None and not isinstance(value, list)
    }


def verdict_tags(verdict: dict[str, Any] | None) -> dict[str, str]:
    """What the gate said of a version, if it was asked: passed or refused, when, and each check."""
    if verdict is None:
        return {}
    found = {"gate.verdict": "passed" if verdict["passed"] else "refused", "gate.time": verdict["time"]}
    for check in verdict["checks"]:
        found[f"gate.{check['what']}"] = (
            f"{'passed' if check['passed'] else 'refused'}: {check['found']}; {check['rule']}"
        )
    return {_clean(key): _text(value)[:_TAG_LENGTH] for key, value in found.items()}


def live_points(path: Path, offset: int) -> Iterator[tuple[int, list[Point]]]:
    """The whole lines of a metrics.jsonl from a byte on: the byte after each, and its points.

    A line torn by a power cut has no points, and does not hold up those after it; a last line without an end is left.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            points = []
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                row = json.loads(line)
                time, step = int(row["time"]), int(row["step"])
                points = [Point(_clean(key), float(value), time, step) for key, value in row["metrics"].items()]
            yield offset, points


def table_points(folder: Path, record: RunRecord) -> list[Point]:
    """The curves of outputs/train/history.csv and valid.csv, whose rows have no time: steps are spread over the run."""
    rows = [
        (prefix, int(row["step"]), row)
        for prefix, file in (("train", "history.csv"), ("valid", "valid.csv"))
        for row in _table(folder / file)
    ]
    start = record.started
    span = max((record.finished or start) - start, 0)
    last = max((step for _, step, _ in rows), default=0) or 1
    points = []
    for prefix, step, row in sorted(rows, key=lambda entry: entry[1]):
        for column, text in row.items():
            if column != "step" and text not in ("", None):
                points.append(Point(f"{prefix}/{column}", float(text), int((start + span * step / last) * 1000), step))
    return points


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing if there is none: a view shows what is there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        name = f"{prefix}{_clean(key)}"
        if isinstance(value, dict):
            yield from _numbers(value, f"{name}/")
        elif isinstance(value, list) and len(value) == 2:
            yield from _numbers({"low": value[0], "high": value[1]}, f"{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def _source(data: dict[str, Any]) -> str:
    return str(data.get("path", "data"))


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [row for row in csv.DictReader(file) if row.get("step")]
    except OSError:
        return []


def _clean(key: str) -> str:
    """A name that MLflow takes: letters, digits, _ - . space : and /."""
    return re.sub(r"[^\w\-. :/]", "_", str(key))[:_KEY_LENGTH]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
