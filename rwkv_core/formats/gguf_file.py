"""A GGUF file as it lies: its metadata, and its tensors mapped.

Source: ggml-org/ggml, docs/gguf.md. The `gguf` package has a reader too; of 65536 tokens it makes as many arrays, which takes
seconds a file.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_core.errors import InputError
from rwkv_core.formats import q8_0
from rwkv_core.formats.container import mapped

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KINDS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_Q8_0 = 8
_VERSIONS = (2, 3)


class Stored(NamedTuple):
    """A tensor of the file."""

    data: Tensor
    """Mapped; of a packed one uint8, with the last dimension in bytes."""
    packed: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""
        return torch.float32 if self.packed else self.data.dtype

    def values(self) -> Tensor:
        """What it is, in float32 where it was packed."""
        return q8_0.unpack(self.data) if self.packed else self.data


class File(NamedTuple):
    """What a GGUF file holds."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def is_one(path: Path) -> bool:
    """Whether a file is GGUF, by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read(path: Path) -> File:
    """Metadata and tensors, under the names that they have.

    Raises:
        InputError: there is no such file, it is cut short or damaged, or a tensor is of a type that is not read.
    """
    if not path.is_file():
        raise InputError(str(path), "no model is there", "correct the path, or download the model to it")
    try:
        return _read(path)
    except (struct.error, UnicodeDecodeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"{path}: {path.stat().st_size} bytes that can't be read ({reason})",
            "the file is cut short or no GGUF",
            "download it again",
        ) from None


class _Cursor:
    """Where in the bytes one is."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        """One value of `struct`'s form."""
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def string(self) -> str:
        size = self.take("Q")
        if size > len(self.data) - self.at:
            raise ValueError(f"a text of {size} bytes")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        inner, count = self.take("I"), self.take("Q")
        if inner in (_STRING, _ARRAY):
            return [self.value(inner) for _ in range(count)]
        form = f"<{count}{_SCALARS[inner]}"
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return list(values)


def _read(path: Path) -> File:
    content = mapped(path)
    cursor = _Cursor(content)
    if cursor.take("4s") != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.take("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}")
    count, entries = cursor.take("Q"), cursor.take("Q")
    metadata = {}
    for _ in range(entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.take("I"))
    found = []
    for _ in range(count):
        name, dimensions = cursor.string(), cursor.take("I")
        shape = tuple(cursor.take("Q") for _ in range(dimensions))[::-1]  # the file has the innermost first
        found.append((name, shape, cursor.take("I"), cursor.take("Q")))
    alignment = int(metadata.get("general.alignment", 32))
    begin = -(-cursor.at // alignment) * alignment
    return File(
        metadata, {name: _tensor(content, path, name, shape, kind, begin + at) for name, shape, kind, at in found}
    )


def _tensor(content: mmap.mmap, path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Stored:
    if kind != _Q8_0 and kind not in _KINDS:
        raise InputError(
            f"{path}: {name} is of ggml's type {kind}",
            "F32, F16, BF16 and Q8_0 are read",
            "give a file of one of these",
        )
    dtype = torch.uint8 if kind == _Q8_0 else _KINDS[kind]
    if kind == _Q8_0:
        shape = (*shape[:-1], shape[-1] // q8_0.BLOCK * q8_0.BYTES)
    data = torch.frombuffer(content, dtype=dtype, count=torch.Size(shape).numel(), offset=offset)
    return Stored(data.view(shape), kind == _Q8_0)
