"""Hugging Face's names for RWKV: what fla, transformers and RWKV's own repositories have in place of the official ones.

What an official checkpoint has goes through `to_official` unchanged, so nobody need know what a file is.
Shapes: A, C channels, D a low rank.
Sources: fla-org/flash-linear-attention: utils/convert_from_rwkv7.py, utils/convert_from_rwkv6.py, and for x_x, which its first
versions had, fla/models/rwkv7/modeling_rwkv7.py; huggingface/transformers: models/rwkv/convert_rwkv_checkpoint_to_hf.py
(RWKV-4); BBuf/RWKV-World-HF-Tokenizer: scripts/convert_rwkv5_checkpoint_to_hf.py and convert_rwkv6_checkpoint_to_hf.py.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor


def _same(x: Tensor) -> Tensor:
    return x


def _turned(x: Tensor) -> Tensor:
    """(D, C) of nn.Linear <-> (C, D)."""
    return x.mT.contiguous() if x.ndim == 2 else x


def _vector(x: Tensor) -> Tensor:
    """(C,) -> (1, 1, C)."""
    return x.view(1, 1, -1) if x.ndim == 1 else x


def _flat(x: Tensor) -> Tensor:
    """(1, 1, C) -> (C,)."""
    return x.flatten()


_Change = Callable[[Tensor], Tensor]

# official name: fla's, how a tensor becomes official, how it becomes fla's. Both without the block's number.
_NORMS: dict[str, tuple[str, _Change, _Change]] = {
    f"{official}.{x}": (f"{fla}.{x}", _same, _same)
    for official, fla in (("ln0", "pre_norm"), ("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("att.ln_x", "attn.g_norm"))
    for x in ("weight", "bias")
}
_FLA_7 = {
    **_NORMS,
    **{f"att.x_{x}": (f"attn.x_{x}", _vector, _same) for x in "rwkvag"},
    **{f"att.{x}0": (f"attn.{x}_lora.lora.2.bias", _vector, _flat) for x in "wav"},
    **{f"att.{x}1": (f"attn.{x}_lora.lora.0.weight", _turned, _turned) for x in "wavg"},
    **{f"att.{x}2": (f"attn.{x}_lora.lora.2.weight", _turned, _turned) for x in "wavg"},
    "att.r_k": ("attn.r_k", _same, _same),
    "att.k_k": ("attn.k_k", _vector, _flat),
    "att.k_a": ("attn.k_a", _vector, _flat),
    **{f"att.{x}.weight": (f"attn.{x[0]}_proj.weight", _same, _same) for x in ("receptance", "key", "value", "output")},
    "ffn.x_k": ("ffn.x_k", _vector, _flat),
}
_FROM_FLA = {fla: (official, change) for official, (fla, change, _) in _FLA_7.items()}

# fla's RWKV-6 has some tensors of five parts, in the order r, w, k, v, g; the official order is w, k, v, r, g.
_OFFICIAL_FIVE = [1, 2, 3, 0, 4]


def _five_in_columns(x: Tensor) -> Tensor:
    """(5D, C) -> (C, 5D)."""
    if x.ndim != 2 or not x.numel() or len(x) % 5:
        return x
    return x.reshape(5, -1, x.shape[1])[_OFFICIAL_FIVE].flatten(0, 1).mT.contiguous()


def _five_matrices(x: Tensor) -> Tensor:
    """(C, 5D) -> (5, D, C)."""
    if x.ndim != 2 or not x.numel() or x.shape[1] % 5:
        return x
    return x.mT.reshape(5, -1, len(x))[_OFFICIAL_FIVE]


_FROM_FLA |= {
    "attn.x_proj.0.mu": ("att.time_maa_x", _vector),
    "attn.x_proj.0.linear.weight": ("att.time_maa_w1", _five_in_columns),
    "attn.x_proj.2.weight": ("att.time_maa_w2", _five_matrices),
    "attn.w_proj.linear.lora.0.weight": ("att.time_decay_w1", _turned),
    "attn.w_proj.linear.lora.2.weight": ("att.time_decay_w2", _turned),
    "attn.w_proj.linear.lora.2.bias": ("att.time_decay", _vector),
    "attn.bonus": ("att.time_faaaa", _same),
    **{f"attn.{x[0]}_proj.linear.weight": (f"att.{x}.weight", _same) for x in ("receptance", "key", "value", "gate")},
    "ffn.key.mu": ("ffn.time_maa_k", _vector),
    "ffn.receptance.mu": ("ffn.time_maa_r", _vector),
    "ffn.key.linear.weight": ("ffn.key.weight", _same),
    "ffn.receptance.linear.weight": ("ffn.receptance.weight", _same),
}
_IN_ROWS = {"x_x": ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"), "x_bias": tuple(f"time_maa_{x}" for x in "rwkvg")}

# transformers' and RWKV's own names of RWKV-4, 5 and 6, part by part
_TRANSFORMERS = {
    "emb": "embeddings",
    "att": "attention",
    "ffn": "feed_forward",
    "ln0": "pre_ln",
    **{f"time_mix_{x[0]}": f"time_mix_{x}" for x in ("key", "value", "receptance", "gate")},
}
_FROM_TRANSFORMERS = {theirs: official for official, theirs in _TRANSFORMERS.items()}
_OUTSIDE = {"emb": "embeddings", "ln_out": "norm", "head": "lm_head"}  # of fla's blocks
_FROM_OUTSIDE = {theirs: official for official, theirs in _OUTSIDE.items()}


def to_official(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The official tensors that one of a Hugging Face model is, nearly always one. A tensor of another name stays as it is.

    A tensor of a wrong shape has an official one's name and stays of a wrong shape.
    """
    name = name.removeprefix("model.").removeprefix("rwkv.")
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if found is None:
        first, *rest = name.split(".")
        yield ".".join((_FROM_OUTSIDE.get(first, first), *(_FROM_TRANSFORMERS.get(part, part) for part in rest))), x
        return
    layer, inner = found.groups()
    rows = _IN_ROWS.get(inner.removeprefix("attn."), ())
    if rows and x.ndim == 2 and len(x) == len(rows):
        for row, part in zip(rows, x, strict=True):
            yield f"blocks.{layer}.att.{row}", _vector(part)
        return
    official, change = _FROM_FLA.get(inner, (inner, _same))
    yield f"blocks.{layer}.{official}", change(x)


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint as Hugging Face's models have it: of RWKV-7, fla's; of RWKV-4 transformers'; of RWKV-5 and 6, RWKV's own.

    What RWKV-7 has of v0, v1 and v2 in its first block is left out: nothing uses it, and fla has no place for it.
    """
    if "blocks.0.att.x_r" not in tensors:
        named = {".".join(_TRANSFORMERS.get(part, part) for part in name.split(".")): x for name, x in tensors.items()}
        return {name if name.startswith("head.") else f"rwkv.{name}": x for name, x in named.items()}
    converted: dict[str, Tensor] = {}
    for name, x in tensors.items():
        first, _, rest = name.partition(".")
        if first == "blocks" and not name.startswith(("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")):
            layer, inner = rest.split(".", 1)
            theirs, _, change = _FLA_7.get(inner, (inner, _same, _same))
            converted[f"model.layers.{layer}.{theirs}"] = change(x)
        elif first != "blocks":
            converted[("" if first == "head" else "model.") + f"{_OUTSIDE.get(first, first)}.{rest}"] = x
    return converted


def head_size_divisor(folder: Path) -> float | None:
    """What the config.json of a Hugging Face folder says about it; None if it says nothing, or there is none.

    fla's RWKV-7 has no divisor, but an epsilon of head_dim * norm_eps, which does the same.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] == "rwkv7":
            found = math.sqrt(float(config["head_dim"]) * float(config["norm_eps"]) / 1e-5)
        else:
            found = float(config["head_size_divisor"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if math.isfinite(found) and found > 0 else None
