"""Adapter files: RWKV-PEFT's keys in a .pth, and beside them in the same file a record that says all a merge needs.

A .pth is a zip archive; the record is one more entry in it, which `torch.load` and older tools pass over. A tensor or a key
for it would be copied into the merged model by RWKV-PEFT's merge scripts.
"""

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError, field_validator, model_validator
from torch import Tensor

from rwkv_core import checkpoint
from rwkv_core.config import AdapterConfig, Config
from rwkv_core.errors import InputError
from rwkv_core.files import whole_file
from rwkv_core.quantize import Form

_ENTRY = "archive/rwkv-flow.json"


class Ingredient(Config):
    """Something that a state was made of without training."""

    kind: Literal["state", "text"]

    name: str
    """Of the file, or the beginning of the text."""

    sha256: str
    """Of the file's bytes, or of the text in UTF-8."""

    weight: float
    """How much of it was taken."""


class AdapterRecord(Config):
    """Where an adapter comes from and what it fits."""

    format: Literal[1]
    """Version of this record."""

    adapter: AdapterConfig
    """Method and settings."""

    quantize: Form = "none"
    """How the frozen matrices were packed in training. Early files do not say it, for none were."""

    base_sha256: str | None
    """The checkpoint that it was trained on, and is merged into. null: not known, of a state made of other programs'."""

    data_sha256: str | None
    """The source text. null here and below: not known, as it was found by `rwkvflow unmerge`."""

    vocabulary_sha256: str | None
    """The tokenizer's table."""

    loaded: str | None = None
    """The adapter that the training began from, if it did from one; not in files of before there was `adapter.load`."""

    run: str | None
    """Digest of all that the training depended on: equal digests, equal adapters. `digest@steps` of one kept on the way."""

    made_of: tuple[Ingredient, ...] = ()
    """Of a state that `rwkvflow state` made: by it, and by no training."""

    @model_validator(mode="after")
    def _of_a_base(self) -> Self:
        if self.base_sha256 is None and self.adapter.kind != "state":
            raise ValueError("base_sha256 is null, which a state's alone may be")
        return self

    @field_validator("adapter", mode="before")
    @classmethod
    def _of_earlier_versions(cls, adapter: Any) -> Any:
        """What a method could not do yet, its records do not say."""
        if not isinstance(adapter, dict):
            return adapter
        later: dict[str, dict[str, Any]] = {"lora": {"dora": False}, "pissa": {"load_init": None}}
        return {"state": "none", "load": None} | later.get(adapter.get("kind", ""), {}) | adapter


def write(path: Path, tensors: Mapping[str, Tensor], record: AdapterRecord) -> None:
    """Save an adapter; the bytes depend on tensors and record alone.

    Raises:
        WorldError: there is no room, or no permission.
    """
    write_each(path, {name: (x.shape, x.dtype) for name, x in tensors.items()}, tensors.values(), record)


def write_each(path: Path, about: checkpoint.About, tensors: Iterable[Tensor], record: AdapterRecord) -> None:
    """As `write`, of tensors that are made one at a time; see `checkpoint.write_each`."""
    entry = zipfile.ZipInfo(_ENTRY, date_time=(1980, 1, 1, 0, 0, 0))
    with whole_file(path) as temporary:
        checkpoint.write_in_place(temporary, about, (x.detach().cpu() for x in tensors))
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr(entry, json.dumps(record.model_dump(mode="json"), indent=2))


def read(path: Path) -> tuple[dict[str, Tensor], AdapterRecord]:
    """The tensors and the record of an adapter file.

    Raises:
        InputError: it can't be read, or has no record.
    """
    tensors, record = checkpoint.read(path), read_record(path)
    if record is None:
        raise InputError(str(path), "has no record of its base and settings", "merge it by `rwkvflow merge`")
    return tensors, record


def read_record(path: Path) -> AdapterRecord | None:
    """The record of an adapter file; None if it has none, as those of other programs.

    Raises:
        InputError: it is of another version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return AdapterRecord.model_validate_json(archive.read(_ENTRY))
    except (KeyError, OSError, zipfile.BadZipFile):
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError(f"{path}: {_ENTRY}", f"is of another version ({reason})", "train the adapter anew") from None


def read_for(base: Path, base_sha256: str, path: Path, remedy: str) -> tuple[dict[str, Tensor], AdapterRecord]:
    """The tensors and the record of an adapter that is to be used with the checkpoint `base`.

    Args:
        base: a file or a folder.
        base_sha256: its digest.
        path: the adapter.
        remedy: what to do if it was trained on another base.

    Raises:
        InputError: it was, as far as its record knows; it can't be read, or has no record.
    """
    tensors, record = read(path)
    if record.base_sha256 not in (base_sha256, None):
        raise InputError(
            f"{base} (sha256 {base_sha256[:12]}...)",
            f"{path} was trained on another base (sha256 {(record.base_sha256 or '')[:12]}...)",
            remedy,
        )
    return tensors, record
