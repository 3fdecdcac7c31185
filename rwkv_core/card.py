"""A model card, as Hugging Face reads it: what the model is, how to load each of its files, and what is known of it.

Nothing in it tells where on a machine something lay: of paths it has the names alone.

Source:
    https://huggingface.co/docs/hub/model-cards, and the specification of its head,
    https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import PurePath
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from rwkv_core import escape, verdict
from rwkv_core.config import CardConfig
from rwkv_core.report import Facts
from rwkv_core.texts import TEXTS as T
from rwkv_core.texts import Text
from rwkv_core.verdict import Measure

_RELEASES = (
    (r"RWKV-?x070-World|rwkv7-world", "rwkv-7-world"),
    (r"RWKV-?x070-Pile", "rwkv-7-pile"),
    (r"rwkv7[a-z]?-g\d", "rwkv7-g1"),
    (r"RWKV-?x060-World", "rwkv-6-world"),
    (r"RWKV-5-World", "rwkv-5-world"),
    (r"RWKV-4-World", "rwkv-4-world"),
)
"""How BlinkDL calls the checkpoints in each of his repositories on Hugging Face."""


class Subject(NamedTuple):
    """The model that a card is of."""

    base: Mapping[str, Any]
    """Facts of the base: path, version, ..."""
    kind: str
    """Of its adapter: lora, ..."""
    source: PurePath
    """Of its rows."""
    tokenizer: str
    """As data.tokenizer names it."""
    conformance: Mapping[str, Any]
    """conformance.json of its export: {"formats": {name: {"file", "sha256", "bytes", ...}}}."""
    comparison: Mapping[str, Any] | None
    """metrics.json; None: it was not evaluated."""
    facts: Facts
    """Tables: data, model, training. Of a value that is a path, the name is shown."""
    lineage: list[tuple[Text, object]]


def text(subject: Subject, settings: CardConfig) -> str:
    """The card, for README.md of the folder that holds the model's files."""
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # what is no markup of ours is words
        finalize=lambda value: value if isinstance(value, Markup) else escape.markdown(value),
    )
    template = environment.from_string(files("rwkv_core").joinpath("card.md.j2").read_text(encoding="utf-8"))
    return re.sub(r"\n{3,}", "\n\n", template.render(_values(subject, settings))).strip() + "\n"


def release(base: str) -> str | None:
    """The repository on Hugging Face that a checkpoint of this file name is released in; None if it is not known."""
    found = (repository for pattern, repository in _RELEASES if re.match(pattern, base, re.IGNORECASE))
    repository = next(found, None)
    return f"BlinkDL/{repository}" if repository else None


def _values(subject: Subject, settings: CardConfig) -> dict[str, Any]:
    formats: dict[str, Any] = {}
    for name, entry in subject.conformance.get("formats", {}).items():
        formats.setdefault(_family(name), {"file": Markup(entry["file"]), "state": _state(entry)})
    base, source, kind, tokenizer = (
        escape.name(PurePath(path).name)
        for path in (subject.base["path"], subject.source, subject.kind, subject.tokenizer)
    )
    comparison = _named(subject.comparison) if subject.comparison else None
    measures = verdict.measures(comparison) if comparison else []
    found = verdict.judge(comparison, []) if comparison else None
    title = f"{PurePath(base).stem}, {kind} on {source}"
    return {
        "front": Markup("\n".join(_yaml(_head(subject, settings, measures, title)))),
        "title": title,
        "summary": f"RWKV-{subject.base.get('version', '?')} fine-tuned from {base} on {source}.",
        "headline": found.headline.en if found else "It was not evaluated",
        "sentence": found.sentence.en if found else "",
        "files": Markup(escape.table(["file", "for", "size", "read by", "sha256"], _files(subject.conformance))),
        "checked": _checked(subject.conformance),
        "formats": formats,
        "version": str(subject.base.get("version")),
        "tokenizer": None if subject.tokenizer == "world" else tokenizer,
        "vocabulary": Markup(_scalar("rwkv_vocab_v20230424" if subject.tokenizer == "world" else tokenizer)),
        "facts": [(title.en, Markup(_table(rows))) for title, rows in subject.facts],
        "measures": Markup(escape.table(_HEADER, [list(_row(m)) for m in measures])) if measures else "",
        "interval": T["interval_words"].en,
        "points": Markup("\n".join(f"- {escape.markdown(words.en)}" for _, words in found.points)) if found else "",
        "limits": Markup("\n".join(f"- {escape.markdown(words)}" for words in _limits(comparison))),
        "lineage": Markup(_table(row for row in subject.lineage if row[0] is not T["host"])),
    }


def _head(subject: Subject, settings: CardConfig, measures: list[Measure], title: str) -> dict[str, Any]:
    """The card's metadata: what is not known is left out."""
    formats = set(map(_family, subject.conformance.get("formats", {})))
    base = settings.base_model or release(PurePath(subject.base["path"]).name)
    version = subject.base.get("version")
    values: dict[str, Any] = {
        "base_model": base,
        "language": list(settings.languages),
        "license": settings.license,
        "library_name": "transformers" if "hf" in formats else "rwkv",
        "pipeline_tag": "text-generation",
        "tags": [
            "rwkv",
            *([f"rwkv{version}"] if version else []),
            *(["gguf"] if "gguf" in formats else []),
            subject.kind,
        ],
        "datasets": list(settings.datasets),
    }
    if measures:
        values["model-index"] = [{"name": title, "results": list(_results(measures, subject.source.name))}]
    return {name: value for name, value in values.items() if value}


def _results(measures: list[Measure], source: str) -> Iterator[dict[str, Any]]:
    """As the hub's leaderboards want them: task, data set, metric."""
    for m in measures:
        data = f"{source}, held out" if m.group == "held_out" else f"{T[m.group].en}: {m.name.en}"
        kind = "loss" if m.group in ("sources", "general") else PurePath(m.key).name
        yield {
            "task": {"type": "text-generation"},
            "dataset": {"name": escape.name(data), "type": m.group.replace("_", "-")},
            "metrics": [{"type": _slug(kind), "value": round(m.tuned, 6), "name": escape.name(m.name.en)}],
        }


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


_HEADER = ("measure", "base", "tuned", "change", "interval", "items", "verdict")


def _row(m: Measure) -> Iterator[str]:
    yield f"{T[m.group].en}: {m.name.en}"
    yield from (m.shown(m.base), m.shown(m.tuned), m.shown(m.value, change=True))
    yield from (f"{m.shown(m.low, change=True)} to {m.shown(m.high, change=True)}", f"{m.items:,}", T[m.verdict].en)


def _limits(comparison: Mapping[str, Any] | None) -> Iterator[str]:
    yield "It can be wrong and say so fluently, and it knows nothing after its base's and its own data."
    yield "What its base lacks it lacks too: see the base's own card."
    if comparison is None:
        yield "It was not evaluated."
        return
    found = verdict.judge(comparison, [])
    if found.unmeasured:
        yield f"Not measured: {', '.join(group.en for group in found.unmeasured)}."
    yield (
        f"The numbers are of {comparison['documents']:,} held-out documents of the same kind as its training; "
        "on other text it may be better or worse."
    )


def _named(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """With sources by the last part of their path, and tasks by that and the metric's name."""
    measures: dict[str, dict[str, Any]] = {}
    for group, of in comparison.get("measures", {}).items():
        found = measures.setdefault(group, {})
        for name, entry in of.items():
            short = "/".join(PurePath(name).parts[-2 if group in ("tasks", "lm_eval") else -1 :]) or name
            same = sum(each == short or each.startswith(f"{short} (") for each in found)
            found[f"{short} ({same + 1})" if same else short] = entry
    return {**comparison, "measures": measures}


def _table(rows: Any) -> str:
    return escape.table(["", ""], [(name.en, _plain(value)) for name, value in rows])


def _plain(value: object) -> str:
    if isinstance(value, Text):
        return value.en
    return value.name if isinstance(value, PurePath) else str(value)


_CLIENTS = {
    "pth": "RWKV Runner, the rwkv package",
    "st": "Ai00, web-rwkv, RWKV Runner (WebGPU)",
    "gguf": "llama.cpp, Ollama",
    "hf": "Transformers, with flash-linear-attention",
    "lora": "Ai00, beside the base",
}


def _files(conformance: Mapping[str, Any]) -> Iterator[list[str]]:
    readers = {one["file"]: one["reader"] for one in conformance.get("conformance", {}).get("files", [])}
    for name, entry in conformance.get("formats", {}).items():
        clients = _CLIENTS.get(_family(name), name)
        for one, what in ((entry, clients), (entry.get("state"), f"{clients}: the tuned state")):
            if one:
                reader = readers.get(one["file"], "")
                yield [one["file"], what, verdict.size(one.get("bytes", 0)), reader, one.get("sha256", "")]


def _checked(conformance: Mapping[str, Any]) -> str:
    """How the files were proved, in a sentence."""
    if not conformance.get("formats"):
        return "It has not been exported yet."
    match conformance.get("conformance", {}).get("mode"):
        case "full":
            return (
                "Each was read by another program than the one that wrote it, which computed the logits of three prompts as "
                "they were in training."
            )
        case "structure":
            return "Each was read by another program than the one that wrote it, tensor by tensor; no logits were computed."
    return "Each was read back and compared with the trained model."


def _family(form: str) -> str:
    """gguf, of gguf-f16."""
    return form.partition("-")[0]


def _state(entry: Mapping[str, Any]) -> dict[str, Markup] | None:
    return {"file": Markup(entry["state"]["file"])} if entry.get("state") else None


def _scalar(value: Any) -> str:
    return json.dumps(escape.name(value) if isinstance(value, str) else value, ensure_ascii=False)


def _yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Mappings, lists and scalars as lines of YAML; a scalar as JSON has it, which is YAML too."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, Mapping | list):
                yield f"{indent}{key}:"
                yield from _yaml(inner, f"{indent}  ")
            else:
                yield f"{indent}{key}: {_scalar(inner)}"
    else:
        for inner in value:
            if isinstance(inner, Mapping):
                first, *rest = _yaml(inner, f"{indent}  ")
                yield f"{indent}- {first.lstrip()}"
                yield from rest
            else:
                yield f"{indent}- {_scalar(inner)}"
