"""Reads a Hugging Face folder by the rules of fla's RWKV7ForCausalLM: config.json, its names, nn.Linear's orientation.

Source: fla-org/flash-linear-attention: fla/models/rwkv7/configuration_rwkv7.py and modeling_rwkv7.py, fla/layers/rwkv7.py,
fla/modules/layernorm.py. fla computes in Triton, which has no CPU: so this reader has its equations from `recurrence`.
"""

import json
import math
from pathlib import Path
from typing import Any

from rwkv_core.conformance import layout, safetensors_file
from rwkv_core.conformance.contents import Contents, Stored, Unreadable

_BLOCK = {
    **{f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias") for ours, theirs in (
        ("ln0", "pre_norm"), ("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("att.ln_x", "attn.g_norm")
    )},
    **{f"att.x_{one}": f"attn.x_{one}" for one in layout.LERPS},
    **{f"att.{one}0": f"attn.{one}_lora.lora.2.bias" for one in "wav"},
    **{f"att.{one}1": f"attn.{one}_lora.lora.0.weight" for one in "wavg"},
    **{f"att.{one}2": f"attn.{one}_lora.lora.2.weight" for one in "wavg"},
    **{f"att.{one}": f"attn.{one}" for one in ("k_k", "k_a", "r_k")},
    **{f"att.{one}.weight": f"attn.{one[0]}_proj.weight" for one in ("receptance", "key", "value", "output")},
    "ffn.x_k": "ffn.x_k", "ffn.key.weight": "ffn.key.weight", "ffn.value.weight": "ffn.value.weight",
}  # fmt: skip
_OUTSIDE = {
    "emb.weight": "model.embeddings.weight", "ln_out.weight": "model.norm.weight", "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}  # fmt: skip
_TURNED = tuple(f"att.{one}{i}" for one in "wavg" for i in "12")
_RANKS = {"decay_low_rank_dim": "w1", "gate_low_rank_dim": "g1", "a_low_rank_dim": "a1", "v_low_rank_dim": "v1"}


def read(path: Path) -> Contents:
    """A model as fla finds it.

    Raises:
        Unreadable: it would not load it.
    """
    folder = path if path.is_dir() else path.parent
    config = _json(folder / "config.json")
    if config.get("model_type") != "rwkv7":
        raise Unreadable(f"its config.json says model_type {config.get('model_type')!r}; fla's is rwkv7")
    held, wrong = tensors(folder), list[tuple[str, str, str]]()
    try:
        n_layer, channels, size = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "head_dim"))
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"its config.json does not say {error}") from None
    wanted = [name for name in layout.names("7", n_layer) if name not in layout.UNUSED]
    theirs = {name: _theirs(name) for name in wanted}
    found = {
        name: held[their]._replace(turned=_inner(name) in _TURNED) for name, their in theirs.items() if their in held
    }
    for key, value in _said(found, n_layer).items():
        if config.get(key) != value:
            wrong.append((f"config.json: {key}", str(config.get(key)), f"{value}, as the tensors say"))
    if config.get("architectures") != ["RWKV7ForCausalLM"]:
        wrong.append(("config.json: architectures", str(config.get("architectures")), "RWKV7ForCausalLM"))
    if config.get("tie_word_embeddings"):
        wrong.append(("config.json: tie_word_embeddings", "true", "false: the head is a matrix of its own"))
    eps = float(config.get("norm_eps", 1e-5))
    return Contents(
        "7",
        n_layer,
        found,
        heads=channels // size,
        norm_eps=eps,
        group_eps=size * eps,
        decay=math.exp(-0.5),
        unexpected=tuple(name for name in held if name not in theirs.values()),
        missing=tuple(their for name, their in theirs.items() if name not in found),
        findings=tuple(wrong),
        facts=config,
    )


def tensors(folder: Path) -> dict[str, Stored]:
    """Of model.safetensors, or of the parts that the index names.

    Raises:
        Unreadable: a part is missing, or the index does not tell the truth.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            raise Unreadable("there is neither model.safetensors nor its index")
        return safetensors_file.tensors(folder / "model.safetensors")[0]
    where = _json(index).get("weight_map", {})
    found = dict[str, Stored]()
    for part in sorted(set(where.values())):
        if "/" in part or not (folder / part).is_file():
            raise Unreadable(f"the index names {part}, which is not there")
        held, _ = safetensors_file.tensors(folder / part)
        lied = [name for name in held if where.get(name) != part]
        if lied:
            raise Unreadable(f"{part} has {lied[0]}, and the index says otherwise")
        found |= held
    lost = sorted(where.keys() - found.keys())
    if lost:
        raise Unreadable(f"the index names {lost[0]}, which is in no part")
    return found


def _said(found: dict[str, Stored], n_layer: int) -> dict[str, Any]:
    """What config.json must say."""
    said: dict[str, Any] = {}
    if "emb.weight" in found:
        said["vocab_size"], said["hidden_size"] = found["emb.weight"].shape
    if "blocks.0.ffn.key.weight" in found:
        said["intermediate_size"] = found["blocks.0.ffn.key.weight"].shape[0]
    if "blocks.0.att.r_k" in found:
        said["head_dim"] = found["blocks.0.att.r_k"].shape[1]
    for key, name in _RANKS.items():
        x = found.get(f"blocks.{1 if name == 'v1' and n_layer > 1 else 0}.att.{name}")
        if x is not None:
            said[key] = x.shape[1]
    return said


def _inner(name: str) -> str:
    """blocks.3.att.w1 -> att.w1."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def _theirs(name: str) -> str:
    if not name.startswith("blocks."):
        return _OUTSIDE[name]
    _, layer, inner = name.split(".", 2)
    return f"model.layers.{layer}.{_BLOCK[inner]}"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise Unreadable(f"{path.name} is not there") from None
    except ValueError as error:
        raise Unreadable(f"{path.name} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise Unreadable(f"{path.name} holds a {type(found).__name__}")
    return found
