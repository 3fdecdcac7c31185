"""The order of the official files, for forms that keep none. Some converters read x_r to x_g of RWKV-7 by it.

Source: the order in which BlinkDL/RWKV-LM's models have their parameters: RWKV-v4neo, RWKV-v5 and RWKV-v7; in the attention of
RWKV-7, that of the released files.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_OUTSIDE = ("emb", "blocks", "ln_out", "head")
_BLOCK = ("ln1", "ln2", "ln0", "att", "ffn")
_MIX_4 = (
    "time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r", "key", "value", "receptance", "output",
)  # fmt: skip
_MIX_5 = (
    "time_mix_k", "time_mix_v", "time_mix_r", "time_mix_g",
    "time_maa_x", "time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g", "time_maa_w1", "time_maa_w2",
    "time_decay", "time_decay_w1", "time_decay_w2", "time_faaaa", "time_first", "time_state",
    "x_r", "x_w", "x_k", "x_v", "x_a", "x_g",
    "w0", "r_k", "w1", "w2", "a1", "a2", "a0", "g1", "g2", "v2", "v1", "v0", "k_k", "k_a",
    "receptance", "key", "value", "output", "gate", "ln_x",
)  # fmt: skip
"""Of RWKV-5, 6 and 7."""
_CHANNEL = (
    "time_mix_k", "time_mix_r", "time_maa_k", "time_maa_r", "x_k", "key", "receptance", "value",
)  # fmt: skip
_NAME = re.compile(r"blocks\.(\d+)\.(\w+)\.(\w+)(.*)")


def official(tensors: Mapping[str, T]) -> dict[str, T]:
    """The same tensors, or what stands for them, in the order that the official file of such a model has; unknown ones last."""
    time_mix = _MIX_5 if any(".att.ln_x." in name for name in tensors) else _MIX_4

    def place(name: str) -> tuple[int | str, ...]:
        section = _at(_OUTSIDE, name.split(".")[0])
        found = _NAME.fullmatch(name)
        if found is None:
            return section, 0, 0, 0, *_weight_first(name)
        layer, module, leaf, rest = found.groups()
        leaves = time_mix if module == "att" else _CHANNEL
        return section, int(layer), _at(_BLOCK, module), _at(leaves, leaf), *_weight_first(leaf + rest)

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _at(order: tuple[str, ...], item: str) -> int:
    return order.index(item) if item in order else len(order)


def _weight_first(name: str) -> tuple[int, str]:
    return int(name.endswith("bias")), name
