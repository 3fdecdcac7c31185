"""Which tensors a model of each version has, under the official names and in the order of the official files.

Source: the parameters that BlinkDL/RWKV-LM's models register (RWKV-v4neo, RWKV-v5, RWKV-v7) and those that the loaders of the
`rwkv` package, web-rwkv and llama.cpp ask for.
"""

import re
from collections.abc import Collection

_NORMS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")
_FIRST = ("ln0.weight", "ln0.bias")
_GROUP = ("att.ln_x.weight", "att.ln_x.bias")


def _of(module: str, names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names.split())


_FEED_FORWARD = _of("ffn", "time_mix_k time_mix_r key.weight receptance.weight value.weight")
_BLOCKS = {
    "4": (
        *_of("att", "time_decay time_first time_mix_k time_mix_v time_mix_r"),
        *_of("att", "key.weight value.weight receptance.weight output.weight"),
        *_FEED_FORWARD,
    ),
    "5": (
        *_of("att", "time_mix_k time_mix_v time_mix_r time_mix_g time_decay time_faaaa"),
        *_of("att", "receptance.weight key.weight value.weight output.weight gate.weight"),
        *_GROUP,
        *_FEED_FORWARD,
    ),
    "6": (
        *_of("att", "time_maa_x time_maa_w time_maa_k time_maa_v time_maa_r time_maa_g time_maa_w1 time_maa_w2"),
        *_of("att", "time_decay time_decay_w1 time_decay_w2 time_faaaa"),
        *_of("att", "receptance.weight key.weight value.weight output.weight gate.weight"),
        *_GROUP,
        *_of("ffn", "time_maa_k time_maa_r key.weight receptance.weight value.weight"),
    ),
    "7": (
        *_of("att", "x_r x_w x_k x_v x_a x_g w0 r_k w1 w2 a1 a2 a0 g1 g2 v2 v1 v0 k_k k_a"),
        *_of("att", "receptance.weight key.weight value.weight output.weight"),
        *_GROUP,
        *_of("ffn", "x_k key.weight value.weight"),
    ),
}
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""Of RWKV-7: a file may have them, and nothing reads their values."""

LERPS = ("r", "w", "k", "v", "a", "g")
"""The order of RWKV-7's x_r to x_g. Some converters put them together as they come."""

STATE = re.compile(r"blocks\.(\d+)\.att\.time_state")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def version(names: Collection[str]) -> str:
    """4, 5, 6 or 7, by official names, as clients tell it."""
    if any(name.endswith(".att.r_k") for name in names):
        return "7"
    if any(".time_maa_" in name for name in names):
        return "6"
    return "5" if any(".att.ln_x." in name for name in names) else "4"


def layers(names: Collection[str]) -> int:
    """Number of blocks: one more than the highest that is named."""
    return 1 + max((int(found[1]) for name in names if (found := _BLOCK.match(name))), default=-1)


def names(of_version: str, n_layer: int, *, gated: bool = True, logarithm: bool = False) -> list[str]:
    """All that a model must have, RWKV-7's unused ones among them.

    Args:
        of_version: 4, 5, 6 or 7.
        n_layer: number of blocks.
        gated: whether an RWKV-5 has a gate; 5.0 has none.
        logarithm: whether its bonus is called time_first, and is the logarithm of it.
    """
    found = ["emb.weight"]
    for i in range(n_layer):
        inner = [*(_FIRST if i == 0 else ()), *_NORMS, *_BLOCKS[of_version]]
        if of_version == "5" and not gated:
            inner = [name for name in inner if name not in ("att.time_mix_g", "att.gate.weight")]
        if of_version == "5" and logarithm:
            inner = [name.replace("time_faaaa", "time_first") for name in inner]
        found += [f"blocks.{i}.{name}" for name in inner]
    return [*found, "ln_out.weight", "ln_out.bias", "head.weight"]
