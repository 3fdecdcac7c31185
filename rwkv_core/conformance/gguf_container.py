"""Reads a GGUF file by the format's definition: fields, then where the tensors are, then their bytes.

Source: ggml-org/ggml, docs/gguf.md; of Q8_0: ggml/src/ggml-common.h, block_q8_0.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_core.conformance.contents import Array, Stored, Unreadable

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KINDS = {0: "F32", 1: "F16", 8: "Q8_0", 30: "BF16"}
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_Q8_0 = np.dtype([("scale", "<f2"), ("steps", "i1", 32)])
_MOST_DIMENSIONS = 4


class _Cursor:
    """Walks through the file's head."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        """One number."""
        (found,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def text(self) -> str:
        """A string: its length, its bytes."""
        length = self.take("Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"a string of {length} bytes")
        found = bytes(self.data[self.at : self.at + length]).decode("utf-8", "surrogateescape")
        self.at += length
        return found

    def value(self, kind: int) -> Any:
        """A value of a field."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])
        inner, count = self.take("I"), self.take("Q")
        if count > len(self.data):
            raise ValueError(f"an array of {count} values")
        if inner in _SCALARS:
            found = np.frombuffer(self.data, f"<{_SCALARS[inner]}", count, self.at)
            self.at += found.nbytes
            return found.tolist()
        return [self.value(inner) for _ in range(count)]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The fields, and the tensors in the file's order. Shapes are as numpy has them: the reverse of ggml's.

    Raises:
        Unreadable: it is no GGUF, is damaged or cut short, or has a kind of quantization that is not read here.
    """
    if path.stat().st_size < 24:
        raise Unreadable("it is no GGUF: it has no room for a header")
    mapped = np.memmap(path, np.uint8, "r")
    cursor = _Cursor(memoryview(mapped))  # type: ignore[arg-type]
    try:
        magic, version = bytes(mapped[:4]), struct.unpack_from("<I", cursor.data, 4)[0]
        if magic != b"GGUF" or version not in (2, 3):
            raise Unreadable(f"it is no GGUF of version 2 or 3: it begins with {magic!r}, {version}")
        cursor.at = 8
        tensors, fields = cursor.take("Q"), cursor.take("Q")
        facts: dict[str, Any] = {}
        for _ in range(fields):
            name, kind = cursor.text(), cursor.take("I")
            facts[name] = cursor.value(kind)
        infos = []
        for _ in range(tensors):
            name, dimensions = cursor.text(), cursor.take("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"{name} has {dimensions} dimensions")
            shape = tuple(reversed([cursor.take("Q") for _ in range(dimensions)]))
            infos.append((name, shape, cursor.take("I"), cursor.take("Q")))
        alignment = int(facts.get("general.alignment", 32))
        begin = -(-cursor.at // alignment) * alignment
    except (struct.error, ValueError, KeyError, MemoryError) as error:
        raise Unreadable(f"its header can't be read ({error})") from None
    found: dict[str, Stored] = {}
    for name, shape, kind, offset in infos:
        if kind not in _KINDS:
            raise Unreadable(f"{name} is of ggml's type {kind}; F32, F16, BF16 and Q8_0 are read here")
        if name in found or offset % alignment:
            raise Unreadable(
                f"{name} is there twice" if name in found else f"{name} begins at {offset}, which is not aligned"
            )
        found[name] = _tensor(name, mapped[begin + offset :], shape, _KINDS[kind])
    return facts, found


def _tensor(name: str, data: Array, shape: tuple[int, ...], kind: str) -> Stored:
    """A tensor whose bytes begin where `data` does."""
    count = math.prod(shape)
    packed = kind == "Q8_0"
    size = count // 32 * _Q8_0.itemsize if packed else count * np.dtype(_NUMPY[kind]).itemsize
    if packed and (not shape or shape[-1] % 32):
        raise Unreadable(f"{name} is Q8_0 in rows of {shape[-1] if shape else 1}: they are packed 32 values at a time")
    if size > len(data):
        raise Unreadable(f"it ends within {name}: the file is cut short")
    if packed:
        raw = data[:size].reshape(*shape[:-1], -1)
        return Stored(raw, kind, decode=_unpacked)
    return Stored(data[:size].view(_NUMPY[kind]).reshape(shape), kind)


def _unpacked(raw: Array) -> Array:
    """Rows of bytes -> float32."""
    blocks = np.ascontiguousarray(raw).view(_Q8_0)
    values = blocks["scale"].astype(np.float32)[..., None] * blocks["steps"].astype(np.float32)
    return values.reshape(*raw.shape[:-1], -1)
