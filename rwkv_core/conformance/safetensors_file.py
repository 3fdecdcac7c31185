"""Reads a .safetensors by the format's definition: a length, a header in JSON, the bytes.

Source: huggingface/safetensors, README, "Format".
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_core.conformance.contents import Stored, Unreadable

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_LARGEST_HEADER = 100_000_000  # bytes; more is refused by the library


def tensors(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Tensors by their names in the order of their bytes, and the metadata.

    Raises:
        Unreadable: the header or the bytes are not what the definition says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise Unreadable(f"it has {size} bytes, and its header would have {length}")
        try:
            header = json.loads(file.read(length))
            about = header.pop("__metadata__", {})
            entries = sorted(
                (tuple(entry["data_offsets"]), name, entry["dtype"], tuple(entry["shape"]))
                for name, entry in header.items()
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unreadable(f"its header can't be read ({error})") from None
    mapped = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    found, at = {}, 0
    for (begin, end), name, kind, shape in entries:
        if kind not in _NUMPY:
            raise Unreadable(f"{name} is {kind}: no client computes with it")
        if begin != at or end - begin != int(np.prod(shape, dtype=np.int64)) * np.dtype(_NUMPY[kind]).itemsize:
            raise Unreadable(f"{name} is said to lie at bytes {begin} to {end}, as {kind} {shape}, behind byte {at}")
        at = end
        if 8 + length + end > size:
            raise Unreadable(f"it ends within {name}: the file is cut short")
        raw = (
            mapped[8 + length + begin : 8 + length + end].view(_NUMPY[kind])
            if (8 + length + begin) % 4 == 0
            else (np.frombuffer(mapped[8 + length + begin : 8 + length + end].tobytes(), _NUMPY[kind]))
        )
        found[name] = Stored(raw.reshape(shape), kind)
    if 8 + length + at != size:
        raise Unreadable(f"{size - 8 - length - at} bytes lie behind the last tensor")
    return found, about
