"""The form that starts a run in Prefect's UI: settings of params.yaml, by their dotted names, as JSON Schema and as given.

Types, ranges and help texts are those of `rwkv_core.config`, values those of params.yaml when the deployments are registered.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rwkv_core.config import AdapterConfig
from rwkv_core.errors import InputError
from tasks.params import Params

TRAINING = {
    "model.base": "Base model",
    "data.source": "Data",
    "train.ctx_len": "Context length",
    "train.epochs": "Epochs",
    "train.micro_batch": "Micro-batch",
    "train.accumulate": "Micro-batches per step",
    "train.optimizer.lr": "Learning rate",
    "train.optimizer.lr_final": "Final learning rate",
    "train.optimizer.warmup_steps": "Warm-up",
    "train.precision": "Precision",
    "model.quantize": "Quantization",
    "train.context.grad_cp": "Gradient checkpointing",
    "adapter": "Adapter",
    "train.saves.every": "Keep adapters",
    "seed": "Seed",
}
"""What the form of a training shows, in its order, and under which titles."""

EVALUATION = {
    "evaluate.ctx_len": "Context length",
    "evaluate.batch": "Documents together",
    "evaluate.resamples": "Bootstrap draws",
    "evaluate.confidence": "Confidence",
    "evaluate.general": "General text",
}
"""What the form of an evaluation shows."""

MODELS = Path("models")
"""The folder whose checkpoints the form offers as bases."""

MORE = "more"
"""Name in the form of the list of other settings, each as name=value."""

_CHECKPOINTS = (".pth", ".safetensors", ".st")
_ENDS = ("train.epochs", "train.steps", "train.tokens")
_BUILT_IN_TOKENIZERS = ("world", "bytes")
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def models(root: Path) -> list[str]:
    """The checkpoints in `root`/models, as paths from `root`: files, and folders that hold one."""
    found = (
        path
        for path in sorted((root / MODELS).glob("*"))
        if not path.name.startswith(".") and (path.is_dir() or path.suffix in _CHECKPOINTS)
    )
    return [path.relative_to(root).as_posix() for path in found]


def schema(root: Path, titles: Mapping[str, str]) -> dict[str, Any]:
    """JSON Schema of the settings named in `titles`, and of any others as text, for the checkout `root`.

    Raises:
        InputError: params.yaml can't be read.
    """
    values = _values(root)
    properties = {}
    for position, (name, title) in enumerate(titles.items()):
        field = _adapter(values) if name == "adapter" else _with_default(_field(name), _at(values, name))
        if name == "model.base":
            offered = [*models(root), str(_at(values, name))]
            field = {key: value for key, value in field.items() if key != "format"} | {
                "enum": list(dict.fromkeys(offered))
            }
        properties[name] = _explained(field, name) | {"title": title, "position": position}
    properties[MORE] = {
        "type": "array",
        "items": {"type": "string", "pattern": r"^[a-z_.]+=.*$"},
        "title": "Other settings",
        "description": "Any others of params.yaml, each as name=value: train.saves.keep_best=3",
        "position": len(properties),
    }
    return {
        "type": "object",
        "title": "Settings",
        "description": "What is left empty is as params.yaml says. Any change makes the run a DVC experiment: the files of "
        "this checkout stay as they are.",
        "properties": properties,
    }


def parameters(flow: Mapping[str, Any], root: Path, titles: Mapping[str, str] | None) -> dict[str, Any]:
    """The JSON Schema of a flow's parameters as a form: titles to read, `settings` typed, and no tabs for null.

    Args:
        flow: the schema that Prefect makes of the function.
        root: the checkout.
        titles: what `settings` shows, if the flow takes any.
    """
    properties = {}
    for name, field in flow["properties"].items():
        if name == "settings" and titles is not None:
            properties[name] = schema(root, titles) | {"position": field["position"]}
            continue
        choices = [choice for choice in field.get("anyOf", [field]) if choice.get("type") != "null"]
        plain = {key: value for key, value in field.items() if key not in ("anyOf", "default")}
        plain |= choices[0] if len(choices) == 1 else {"anyOf": choices}
        title = {"title": name.replace("_", " ").capitalize()}
        properties[name] = _with_default(plain, field.get("default")) | title
    return {**flow, "properties": properties}


def overrides(settings: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Which settings of the checkout `root` are otherwise in a form, by dotted names; a whole `adapter` if its kind is.

    Args:
        settings: dotted names to values; `more` is a list of name=value.
        root: the checkout; paths in settings are those of files in it.

    Raises:
        InputError: a setting is not there, or is a path that leads out of `root`; params.yaml can't be read.
    """
    values = _values(root)
    given = dict(_flat(settings, values))
    if any(given.get(end) is not None for end in _ENDS):  # one of them ends a run, and the others are null
        given = {end: None for end in _ENDS} | given
    changed = {}
    for name, value in given.items():
        if value == _at(values, name):
            continue
        changed[name] = confined(name, value, root)
    return changed


def confined(name: str, value: Any, root: Path) -> Any:
    """The value of a setting that a form asks for; of a path, that from `root`.

    Raises:
        InputError: there is no such setting, or its path leads out of `root`.
    """
    field = _field(name)
    if isinstance(value, Mapping) and (name == "adapter" or "properties" in field):  # a whole section
        return {key: confined(f"{name}.{key}", inner, root) for key, inner in value.items()}
    tokenizer = name == "data.tokenizer" and value not in _BUILT_IN_TOKENIZERS
    if value is None or not (tokenizer or field.get("format") == "path"):
        return value
    home = root.resolve()
    path = (home / str(value)).resolve()  # through links and ..
    if not path.is_relative_to(home):
        raise InputError(
            f"{name} = {value}",
            f"must be inside the project, {home}, but is {path}",
            "put the file into the project; only params.yaml may name files elsewhere",
        )
    return path.relative_to(home).as_posix()


def experiment_name(run_name: str, run_id: str) -> str:
    """What the experiment of a flow run is called: as the run, which Prefect lets have any name, and another may have too."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", run_name).strip("-").lower()[:100]
    return f"{plain or 'run'}-{run_id[:8]}"


def _flat(settings: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a form; an adapter of another kind stays whole, with what it shares with the old one."""
    for name, value in settings.items():
        if name == MORE:
            yield from map(_name_and_value, value or ())
        elif name == "adapter" and value:
            old = values["adapter"]
            if value.get("kind", old["kind"]) == old["kind"]:
                yield from ((f"adapter.{key}", inner) for key, inner in value.items())
            else:
                section = _kind(value["kind"])
                empty = {key: None for key, field in section.model_fields.items() if _fits(field, None)}
                yield name, empty | _shared(section, old) | value
        elif value is not None:
            yield name, value


def _name_and_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if not equals:
            raise YAMLError
        return name.strip(), YAML(typ="safe").load(value)
    except YAMLError:
        raise InputError(text, "must be a setting and its value", "write train.saves.keep_best=3") from None


def _values(root: Path) -> dict[str, Any]:
    """What params.yaml says, as it is written."""
    path = root / "params.yaml"
    try:
        return dict(YAML(typ="safe").load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(str(path), "every value of a run is read from it", "put it there") from None
    except (YAMLError, TypeError, ValueError) as error:
        raise InputError(str(path), f"is not YAML: {' '.join(str(error).split())}", "correct that place") from None


def _at(values: Mapping[str, Any], name: str) -> Any:
    inside: Any = values
    for part in name.split("."):
        inside = inside.get(part) if isinstance(inside, Mapping) else None
    return inside


def _field(name: str) -> dict[str, Any]:
    """The JSON Schema of one setting, without null: a form says that by leaving it empty.

    Raises:
        InputError: there is no such setting.
    """
    whole = _whole()
    inside: list[Any] = [whole]
    for part in name.split("."):
        sections = [choice for field in inside for choice in _choices(field, whole)]
        inside = [section["properties"][part] for section in sections if part in section.get("properties", {})]
        if not inside and not any(section.get("additionalProperties") for section in sections):
            raise InputError(name, "there is no such setting", "see rwkv_core/config for those there are")
        if not inside:  # an entry of a table, as data.special_tokens
            return {}
    field = {key: value for key, value in inside[0].items() if key not in ("anyOf", "$ref")}
    return field | _choices(inside[0], whole)[0]


@functools.cache
def _whole() -> dict[str, Any]:
    return Params.model_json_schema()


def _choices(field: dict[str, Any], whole: dict[str, Any]) -> list[dict[str, Any]]:
    """What a setting may be, other than null."""
    found = []
    for choice in field.get("anyOf") or field.get("oneOf") or [field]:
        if "$ref" in choice:
            choice = whole["$defs"][choice["$ref"].rpartition("/")[2]]
        if choice.get("type") != "null":
            found.append(choice)
    return found


def _kind(kind: str) -> type[BaseModel]:
    """The adapter of that kind."""
    union = get_args(AdapterConfig)[0]
    for section in get_args(union):
        if kind in get_args(section.model_fields["kind"].annotation):
            return section  # type: ignore[no-any-return]
    raise InputError(f"adapter.kind = {kind}", "there is no such kind", "see rwkv_core/config/model.py")


def _shared(section: type[BaseModel], old: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter of another kind takes over."""
    fields = section.model_fields
    return {name: value for name, value in old.items() if name in fields and _fits(fields[name], value)}


def _fits(field: FieldInfo, value: Any) -> bool:
    try:
        TypeAdapter[Any](Annotated[field.annotation, field]).validate_python(value)  # type: ignore[arg-type]
    except ValidationError:
        return False
    return True


def _adapter(values: Mapping[str, Any]) -> dict[str, Any]:
    """One section for each kind of adapter, that of params.yaml first: the UI shows the first."""
    old = values["adapter"]
    sections = []
    for section in get_args(get_args(AdapterConfig)[0]):
        whole = section.model_json_schema()
        (kind,) = get_args(section.model_fields["kind"].annotation)
        shared = _shared(section, old)
        properties = {"kind": {"type": "string", "enum": [kind], "default": kind, "title": "kind", "position": 0}}
        for position, (name, field) in enumerate(_ordered(whole["properties"]), start=1):
            field = {key: value for key, value in field.items() if key != "anyOf"} | _choices(field, whole)[0]
            field = _explained(_with_default(field, shared.get(name)), f"adapter.{name}")
            properties[name] = field | {"title": name, "position": position}
        required = [
            name
            for name, field in section.model_fields.items()
            if name != "kind" and name not in shared and not _fits(field, None)
        ]
        sections.append(
            {
                "type": "object",
                "title": kind,
                "description": whole["description"],
                "properties": properties,
                "required": ["kind", *required],
                "additionalProperties": False,
            }
        )
    sections.sort(key=lambda section: section["title"] != old["kind"])
    return {"anyOf": sections, "description": "A method and its settings."}


def _ordered(properties: dict[str, Any]) -> list[tuple[str, Any]]:
    """What belongs to the kind alone before what all have, which pydantic puts first."""
    common = ("layers", "state", "load", "targets", "also")
    last = ("targets", "layers", "also", "state", "load")
    own = [item for item in properties.items() if item[0] not in (*common, "kind")]
    return own + [(name, properties[name]) for name in last if name in properties]


def _with_default(field: dict[str, Any], value: Any) -> dict[str, Any]:
    return field if value is None else field | {"default": value}


def _explained(field: dict[str, Any], name: str) -> dict[str, Any]:
    """With its range, and its name in params.yaml, in words: the UI shows no others."""
    words = field.get("description", "").split()
    bounds = [f"{bound} {field[key]}" for key, bound in _BOUNDS.items() if key in field]
    if bounds:
        words.append(f"{', '.join(bounds).capitalize()}.")
    return field | {"description": " ".join([*words, f"({name})"])}
