"""Tuned states: what a model begins from in place of nothing, under RWKV-PEFT's names.

    blocks.0.att.time_state  (H, N, N)  the WKV state: rows are values, columns are keys
    blocks.0.att.ts_state    (C,)       what time mixing has read last, layer-normed
    blocks.0.ffn.ts_state    (C,)       what channel mixing has read last, layer-normed

Clients mount a file of the first alone, one for each block: RWKV Runner counts its tensors.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

WKV = "att.time_state"
SHIFTS = ("att.ts_state", "ffn.ts_state")

PARTS: Mapping[str, tuple[str, ...]] = {"none": (), "wkv": (WKV,), "wkv and token shift": (WKV, *SHIFTS)}
"""Names inside a block, by the setting `adapter.state`."""


def is_part(name: str) -> bool:
    """Whether a tensor is of a tuned state, by its name."""
    return name.endswith((f".{WKV}", *(f".{shift}" for shift in SHIFTS)))


def for_clients(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a state clients mount."""
    return {name: x for name, x in state.items() if name.endswith(f".{WKV}")}


def whole(path: Path) -> Path:
    """Beside a state file for clients, the one that has its token shift too, and that RWKV-Flow alone reads."""
    return path.with_name(f"{path.stem}.rwkv-flow.pth")
