"""params.yaml, read once, checked whole."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rwkv_core.config import (
    AdapterConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    PromoteConfig,
    TrackingConfig,
    TrainConfig,
)
from rwkv_core.errors import InputError

T = TypeVar("T", bound=BaseModel)


class Params(Config):
    """Every value of a run."""

    seed: int = Field(ge=0, lt=2**31)
    """Everything random in a run follows from it."""

    data: DataConfig
    model: ModelConfig
    adapter: AdapterConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    export: ExportConfig
    promote: PromoteConfig
    tracking: TrackingConfig

    def check_retention(self) -> None:
        """Raises InputError if forgetting is to be judged on a text that is not named."""
        if self.promote.retention is not None and self.evaluate.general is None:
            raise InputError(
                f"promote.retention.margin = {self.promote.retention.margin:g}",
                "is of the loss of evaluate.general, which is null",
                "name a general text there, or set promote.retention to null",
            )


def load(path: Path = Path("params.yaml")) -> Params:
    """The parameters in `path`.

    Raises:
        InputError: the file is missing or not YAML, or some values are not valid; all mistakes are named at once, but for those
            between sections.
    """
    return check(_text(path), str(path))


def check(text: str, name: str) -> Params:
    """The parameters in a params.yaml's text.

    Args:
        text: the file's.
        name: what an error calls it.

    Raises:
        InputError: as in `load`.
    """
    params = _parsed(text, name, Params)
    params.train.check_rows(params.adapter.state != "none")
    params.check_retention()
    return params


def read(path: Path, schema: type[T]) -> T:
    """The values in a YAML file, as `schema` has them.

    Raises:
        InputError: as in `load`.
    """
    return _parsed(_text(path), str(path), schema)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            str(path), "every value of a run is read from it", "run this in the repository's root"
        ) from None


def _parsed(text: str, name: str, schema: type[T]) -> T:
    try:
        values = YAML(typ="safe").load(text)
    except YAMLError as error:
        where = " ".join(str(error).split())
        raise InputError(name, f"is not YAML: {where}", "correct that place") from None
    try:
        return schema.model_validate(values if values is not None else {})
    except ValidationError as error:
        mistakes = [_mistake(schema, detail) for detail in error.errors(include_url=False)]
        many = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise InputError(
            name, f"has {many}", "put right:\n" + "\n".join(f"  {mistake}" for mistake in mistakes)
        ) from None


def _mistake(schema: type[BaseModel], detail: Any) -> str:
    """One pydantic error as value: rule; remedy."""
    loc, section, field = _walk(schema, detail["loc"])
    *parents, name = loc or ("",)
    key = ".".join(map(str, loc))
    meaning = " ".join((field.description or "").split()) if field is not None else ""
    if detail["type"] == "missing":
        return f"{key}: is missing; add it" + (f" ({meaning})" if meaning else "")
    if detail["type"] == "extra_forbidden":
        names = list(section.model_fields) if section is not None else []
        close = difflib.get_close_matches(str(name), names, n=1)
        prefix = "".join(f"{parent}." for parent in parents)
        remedy = f"did you mean {prefix}{close[0]}?" if close else f"remove it; the names here are {', '.join(names)}"
        return f"{key} = {detail['input']!r}: there is no such setting; {remedy}"
    rule = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = (
        "" if isinstance(detail["input"], dict) else f" = {detail['input']!r}"
    )  # a rule between settings names them itself
    return f"{key}{shown}: {rule}; change it" + (f" ({meaning})" if meaning else "")


def _walk(schema: type[BaseModel], loc: Iterable[int | str]) -> tuple[list[int | str], Any, Any]:
    """Names from the top to a mistake; the section that has the last, if it is one of a section; and the field it is in.

    Where a section comes in several kinds, pydantic's `loc` has the kind in it, which is no name.
    """
    names: list[int | str] = []
    inside: Any = schema  # a section, its kinds, or None
    section = field = None
    for name in loc:
        if isinstance(inside, tuple):
            inside = next((kind for kind in inside if name in get_args(kind.model_fields["kind"].annotation)), None)
            continue
        names.append(name)
        if inside is None:
            section = None
            continue
        section, field = inside, inside.model_fields.get(name)
        annotation = field.annotation if field is not None else None
        if field is not None and field.discriminator is not None:
            inside = get_args(annotation)
        else:
            choices = (
                get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
            )  # a section or null
            inside = next((kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return names, section, field
