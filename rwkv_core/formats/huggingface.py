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
from typing import Any

import torch
from torch import Tensor

from rwkv_core.errors import InputError
from rwkv_core.files import whole_file
from rwkv_core.formats import container, tuned_state
from rwkv_core.tokenizer import FIRST_FREE


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
_FLAS_FIVE = [3, 0, 1, 2, 4]

RECEPTANCE = 8.0
"""What RWKV-6's receptance is divided by for fla, which gives the norm of a head the epsilon 1e-5, and not 1e-5 * 8 * 8. What a
head reads is linear in it, so it is the same function; and as a power of two it rounds nothing."""

_FOLDED = "receptance_divided_by"
"""Where a config.json of ours says so. fla's own converter does not divide."""


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


def _rows_of_five(x: Tensor) -> Tensor:
    """(C, 5D) -> (5D, C)."""
    return x.mT.reshape(5, -1, len(x))[_FLAS_FIVE].flatten(0, 1)


def _matrix_of_five(x: Tensor) -> Tensor:
    """(5, D, C) -> (C, 5D)."""
    return x[_FLAS_FIVE].flatten(0, 1).mT


_FLA_6: dict[str, tuple[str, _Change]] = {
    **{official: (theirs, change) for official, (theirs, _, change) in _NORMS.items()},
    "att.time_maa_x": ("attn.x_proj.0.mu", _flat),
    "att.time_maa_w1": ("attn.x_proj.0.linear.weight", _rows_of_five),
    "att.time_maa_w2": ("attn.x_proj.2.weight", _matrix_of_five),
    "att.time_decay_w1": ("attn.w_proj.linear.lora.0.weight", _turned),
    "att.time_decay_w2": ("attn.w_proj.linear.lora.2.weight", _turned),
    "att.time_decay": ("attn.w_proj.linear.lora.2.bias", _flat),
    "att.time_faaaa": ("attn.bonus", _same),
    **{f"att.{x}.weight": (f"attn.{x[0]}_proj.linear.weight", _same) for x in ("key", "value", "gate", "receptance")},
    "att.output.weight": ("attn.o_proj.weight", _same),
    "ffn.time_maa_k": ("ffn.key.mu", _flat),
    "ffn.time_maa_r": ("ffn.receptance.mu", _flat),
    "ffn.key.weight": ("ffn.key.linear.weight", _same),
    "ffn.receptance.weight": ("ffn.receptance.linear.weight", _same),
}
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


def _state(x: Tensor) -> Tensor:
    """(1, H, K, V) -> (H, V, K)."""
    return x[0].mT.contiguous() if x.ndim == 4 else x


_FROM_FLA["attn.recurrent_state"] = ("att.time_state", _state)
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
    """A checkpoint as Hugging Face's models have it: RWKV-6 and 7 fla's, RWKV-4 transformers', RWKV-5 RWKV's own.

    What RWKV-7 has of v0, v1 and v2 in its first block is left out: nothing uses it, and fla has no place for it.
    """
    of_6 = any(name.endswith(".time_maa_w1") for name in tensors)
    if not of_6 and "blocks.0.att.x_r" not in tensors:
        named = {".".join(_TRANSFORMERS.get(part, part) for part in name.split(".")): x for name, x in tensors.items()}
        return {name if name.startswith("head.") else f"rwkv.{name}": x for name, x in named.items()}
    names = _FLA_6 if of_6 else {official: (theirs, change) for official, (theirs, _, change) in _FLA_7.items()}
    converted: dict[str, Tensor] = {}
    for name, x in tensors.items():
        first, _, rest = name.partition(".")
        if first != "blocks":
            converted[("" if first == "head" else "model.") + f"{_OUTSIDE.get(first, first)}.{rest}"] = x
        elif not name.startswith(("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")):
            layer, inner = rest.split(".", 1)
            mixes = _IN_ROWS["x_bias"] if of_6 else ()
            if inner.removeprefix("att.") in mixes:
                rows = [tensors[f"blocks.{layer}.att.{mix}"].flatten() for mix in mixes]
                converted.setdefault(f"model.layers.{layer}.attn.x_bias", torch.stack(rows))
            else:
                theirs, change = names.get(inner, (inner, _same))
                converted[f"model.layers.{layer}.{theirs}"] = change(x)
    return converted


def folded(name: str, x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """A tensor of `from_official` as the config.json has it."""
    return x / config[_FOLDED] if _FOLDED in config and name.endswith(".r_proj.linear.weight") else x


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a tuned state as fla has it in its cache: of each layer (1, H, K, V) in float32, where ours is (H, V, K).

    Raises:
        WorldError: there is no room, or no permission.
    """
    turned = {
        f"model.layers.{name.split('.')[1]}.attn.recurrent_state": x.mT[None]
        for name, x in state.items()
        if name.endswith(f".{tuned_state.WKV}")
    }
    with whole_file(path) as temporary:
        about = {name: (x.shape, torch.float32) for name, x in turned.items()}
        container.write_safetensors(temporary, about, turned.values())


def restore(tensors: dict[str, Tensor], folder: Path) -> None:
    """Undo `folded`, in place, where the config.json beside the files of official tensors says that it was done."""
    by = _config(folder).get(_FOLDED)
    if isinstance(by, int | float) and by > 0:
        tensors |= {name: x * by for name, x in tensors.items() if name.endswith(".att.receptance.weight")}


def config(shape: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a model, by its `models.skeleton.Shape`.

    Raises:
        InputError: neither fla nor transformers has such a model.
    """
    of_all = {
        "vocab_size": shape.vocab_size, "hidden_size": shape.n_embd, "intermediate_size": shape.dim_ffn,
        "num_hidden_layers": shape.n_layer, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
        "use_cache": True, "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    of_fla = {"attn_mode": "chunk", "hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "norm_eps": 1e-5}
    heads = shape.n_embd // shape.head_size
    match shape.version:
        case "4":
            every = 6 if dtype == torch.float16 else 0  # it halves what it adds up, where float16 would not hold it
            of_4 = {"attention_hidden_size": shape.dim_att, "layer_norm_epsilon": 1e-5, "rescale_every": every}
            return {
                "architectures": ["RwkvForCausalLM"],
                "model_type": "rwkv",
                **of_all,
                **of_4,
                "context_length": 1024,
            }
        case "6" if shape.head_size_divisor == RECEPTANCE:
            of_6 = {
                "expand_k": 1.0, "expand_v": 1.0, "num_heads": heads, "proj_low_rank_dim": shape.mix_rank,
                "gate_low_rank_dim": shape.decay_rank, "head_size_divisor": shape.head_size_divisor, _FOLDED: RECEPTANCE,
            }  # fmt: skip
            return {"architectures": ["RWKV6ForCausalLM"], "model_type": "rwkv6", **of_all, **of_fla, **of_6}
        case "7" if shape.head_size == shape.head_size_divisor**2:  # its epsilon is head_dim * norm_eps
            of_7 = {
                "head_dim": shape.head_size, "num_heads": heads, "value_dim": [shape.n_embd] * shape.n_layer,
                "hidden_ratio": shape.dim_ffn / shape.n_embd, "decay_low_rank_dim": shape.decay_rank,
                "gate_low_rank_dim": shape.gate_rank, "a_low_rank_dim": shape.a_rank,
                "v_low_rank_dim": shape.v_rank or 32,
            }  # fmt: skip
            return {"architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", **of_all, **of_fla, **of_7}
        case "6" | "7":
            raise InputError(
                f"hf of heads of {shape.head_size} that are divided by {shape.head_size_divisor:g}",
                "fla has another epsilon in their norm",
                "export pth",
            )
    raise InputError(f"hf of an RWKV-{shape.version}", "neither transformers nor fla has one", "export pth")


def head_size_divisor(folder: Path) -> float | None:
    """What the config.json of a Hugging Face folder says about it; None if it says nothing, or there is none.

    fla's RWKV-7 has no divisor, but an epsilon of head_dim * norm_eps, which does the same.
    """
    said = _config(folder)
    try:
        if said["model_type"] == "rwkv7":
            found = math.sqrt(float(said["head_dim"]) * float(said["norm_eps"]) / 1e-5)
        else:
            found = float(said["head_size_divisor"])
    except (ValueError, KeyError, TypeError):
        return None
    return found if math.isfinite(found) and found > 0 else None


def special_tokens(folder: Path) -> dict[str, int]:
    """The texts that are a token each, on the free ids of World's vocabulary, as its added_tokens.json has them."""
    found = _json(folder / "added_tokens.json")
    return {text: i for text, i in found.items() if isinstance(i, int) and i >= FIRST_FREE}


def _config(folder: Path) -> dict[str, Any]:
    """What is in a folder's config.json, if there is one that can be read."""
    return _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    """An object in a file, if it is one that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
