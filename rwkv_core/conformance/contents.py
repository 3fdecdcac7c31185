"""What a reader found in a file: tensors under the official names, still as the file has them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Unreadable(Exception):
    """A client of the format would not load this file; says why."""


def from_bfloat16(x: Array) -> Array:
    """The upper halves of float32 as uint16 -> float32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: Array) -> Array:
    """float32 rounded to bfloat16, to even where it lies between two; still as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return np.where(np.isfinite(x), (rounded & 0xFFFF0000).view(np.float32), x).astype(np.float32)


def to_q8_0(x: Array) -> Array:
    """What llama.cpp's Q8_0 keeps of rows: 32 values share a float16 scale, each is a multiple of it from -127 to 127."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(scale > 0, np.trunc(blocks / scale + np.copysign(0.5, blocks)), 0)
    kept = steps.astype(np.float32) * scale.astype(np.float16).astype(np.float32)
    made: Array = kept.reshape(x.shape).astype(np.float32)
    return made


def _to_float16(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


ROUNDED: Mapping[str, Callable[[Array], Array]] = {
    "F32": lambda x: x.astype(np.float32), "F16": _to_float16, "BF16": to_bfloat16, "Q8_0": to_q8_0,
}  # fmt: skip
"""What is left of float32 values in each kind of storage."""

PLAIN: Mapping[str, Callable[[Array], Array]] = {
    "F32": lambda x: x, "F16": lambda x: x.astype(np.float32), "BF16": from_bfloat16,
}  # fmt: skip
"""Values of arrays as files have them -> float32."""


HALVED = ("att.output.weight", "ffn.value.weight")
"""Matrices whose products are added to the residual stream: those that `Contents.rescale` is about."""


class Stored(NamedTuple):
    """A tensor of a file, not read yet."""

    raw: Array
    """As the file has it, mapped."""
    kind: str
    """F32, F16, BF16 or Q8_0."""
    turned: bool = False
    """Whether the file has the last two dimensions the other way round."""
    decode: Callable[[Array], Array] | None = None
    """raw, or some rows of it -> float32; None: by the kind."""

    def values(self, rows: Any = ...) -> Array:
        """float32, in the official orientation; or some of the file's rows."""
        raw = self.raw[rows]
        x = self.decode(raw) if self.decode is not None else PLAIN[self.kind](raw)
        return np.swapaxes(x, -1, -2) if self.turned and x.ndim > 1 else x

    @property
    def shape(self) -> tuple[int, ...]:
        """In the official orientation."""
        shape: tuple[int, ...] = self.raw.shape
        if self.kind == "Q8_0":
            shape = (*shape[:-1], shape[-1] // 34 * 32)
        return (*shape[:-2], shape[-1], shape[-2]) if self.turned and len(shape) > 1 else shape


@dataclass(frozen=True)
class Contents:
    """A model's file, as a reader of its format has understood it."""

    version: str
    """4, 5, 6 or 7."""
    n_layer: int
    tensors: Mapping[str, Stored]
    """By official names, in the file's order."""
    heads: int = 1
    rescale: int = 0
    """0, or after so many blocks each the file's matrices into the residual stream, and the stream, are halved."""
    norm_eps: float = 1e-5
    group_eps: float = 64e-5
    """Of the group norm behind the state: what the client has, whatever the model was trained with."""
    decay: float = 0.606531
    """The constant e^-0.5 of RWKV-7's decay, to as many digits as the client has."""
    smaller: Mapping[str, float] = field(default_factory=dict)
    """By names inside a block: the file has these matrices divided by so much, a power of 2, as its client's equations want."""
    unexpected: tuple[str, ...] = ()
    """Names in the file that no client of the format knows."""
    missing: tuple[str, ...] = ()
    """Names that it asks for in vain."""
    findings: tuple[tuple[str, str, str], ...] = ()
    """What is against the format's rules: what, what was found, the rule."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Metadata that the checks look at: of GGUF, its fields."""

    def exact(self) -> "Contents":
        """The same without what the client does otherwise than the model's definition."""
        return replace(self, decay=float(np.exp(-0.5)))

    def divisor(self, name: str) -> float:
        """How many times smaller than the model's a tensor is in this file, by the file's own conventions."""
        if not name.startswith("blocks."):
            return 1.0
        _, layer, inner = name.split(".", 2)
        often = int(layer) // self.rescale if self.rescale and inner in HALVED else 0
        return float(self.smaller.get(inner, 1.0)) * 2.0**often

    @property
    def kinds(self) -> dict[str, str]:
        """How each tensor is stored."""
        return {name: x.kind for name, x in self.tensors.items()}
