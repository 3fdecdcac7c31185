"""Reads a Hugging Face folder by the rules of the model that its config.json names: fla's RWKV6 and RWKV7, transformers' Rwkv.

Source: fla-org/flash-linear-attention: fla/models/rwkv6 and rwkv7, fla/layers/rwkv6.py and rwkv7.py; huggingface/transformers:
src/transformers/models/rwkv. fla computes in Triton, which has no CPU: its models' equations are those of `recurrence`.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_core.conformance import layout, safetensors_file
from rwkv_core.conformance.contents import Contents, Stored, Unreadable
from rwkv_core.conformance.pth import state

_NORMS = {
    f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias") for ours, theirs in (
        ("ln0", "pre_norm"), ("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("att.ln_x", "attn.g_norm")
    )
}  # fmt: skip
_FLA = {
    "7": {
        **_NORMS,
        **{f"att.x_{one}": f"attn.x_{one}" for one in layout.LERPS},
        **{f"att.{one}0": f"attn.{one}_lora.lora.2.bias" for one in "wav"},
        **{f"att.{one}1": f"attn.{one}_lora.lora.0.weight" for one in "wavg"},
        **{f"att.{one}2": f"attn.{one}_lora.lora.2.weight" for one in "wavg"},
        **{f"att.{one}": f"attn.{one}" for one in ("k_k", "k_a", "r_k")},
        **{f"att.{one}.weight": f"attn.{one[0]}_proj.weight" for one in ("receptance", "key", "value", "output")},
        "ffn.x_k": "ffn.x_k", "ffn.key.weight": "ffn.key.weight", "ffn.value.weight": "ffn.value.weight",
    },
    "6": {
        **_NORMS,
        "att.time_maa_x": "attn.x_proj.0.mu",
        "att.time_maa_w1": "attn.x_proj.0.linear.weight", "att.time_maa_w2": "attn.x_proj.2.weight",
        **{f"att.time_maa_{one}": "attn.x_bias" for one in "rwkvg"},
        "att.time_decay": "attn.w_proj.linear.lora.2.bias", "att.time_faaaa": "attn.bonus",
        "att.time_decay_w1": "attn.w_proj.linear.lora.0.weight", "att.time_decay_w2": "attn.w_proj.linear.lora.2.weight",
        **{f"att.{one}.weight": f"attn.{one[0]}_proj.linear.weight" for one in ("receptance", "key", "value", "gate")},
        "att.output.weight": "attn.o_proj.weight",
        "ffn.time_maa_k": "ffn.key.mu", "ffn.time_maa_r": "ffn.receptance.mu",
        "ffn.key.weight": "ffn.key.linear.weight", "ffn.receptance.weight": "ffn.receptance.linear.weight",
        "ffn.value.weight": "ffn.value.weight",
    },
}  # fmt: skip
_FLA_OUTSIDE = {
    "emb.weight": "model.embeddings.weight", "ln_out.weight": "model.norm.weight", "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}  # fmt: skip
_TURNED = {
    "6": ("att.time_decay_w1", "att.time_decay_w2", "att.time_maa_w1"),
    "7": tuple(f"att.{one}{i}" for one in "wavg" for i in "12"),
}
_FIVE = "rwkvg"
"""The order in which fla has what RWKV-6 has five of; the official order is w, k, v, r, g."""
_OURS = [_FIVE.index(one) for one in "wkvrg"]
_ARCHITECTURES = {"rwkv": "RwkvForCausalLM", "rwkv6": "RWKV6ForCausalLM", "rwkv7": "RWKV7ForCausalLM"}
_RANKS = {
    "4": {},
    "6": {"proj_low_rank_dim": ("att.time_maa_w2", 1), "gate_low_rank_dim": ("att.time_decay_w1", 1)},
    "7": {
        "decay_low_rank_dim": ("att.w1", 1), "gate_low_rank_dim": ("att.g1", 1),
        "a_low_rank_dim": ("att.a1", 1), "v_low_rank_dim": ("att.v1", 1),
    },
}  # fmt: skip


def read(path: Path) -> Contents:
    """A model as its library finds it.

    Raises:
        Unreadable: it would not load it.
    """
    folder = path if path.is_dir() else path.parent
    config = _json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise Unreadable(f"its config.json says model_type {kind!r}; {', '.join(_ARCHITECTURES)} are RWKV's")
    version = "4" if kind == "rwkv" else str(kind)[-1]
    held = tensors(folder)
    try:
        n_layer, channels = int(config["num_hidden_layers"]), int(config["hidden_size"])
        heads = (
            1 if version == "4" else int(config["num_heads"]) if version == "6" else channels // int(config["head_dim"])
        )
        eps = float(config.get("layer_norm_epsilon" if version == "4" else "norm_eps", 1e-5))
        size = channels // heads
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Unreadable(f"its config.json does not say {error}") from None
    wanted = [name for name in layout.names(version, n_layer) if name not in layout.UNUSED]
    theirs = {name: _theirs(name, version) for name in wanted}
    found = {name: _as_official(name, held[their], version) for name, their in theirs.items() if their in held}
    return Contents(
        version,
        n_layer,
        found,
        heads=heads,
        norm_eps=eps,
        group_eps=size * eps if version == "7" else eps,
        decay=math.exp(-0.5),
        smaller=_smaller(config),
        unexpected=tuple(name for name in held if name not in theirs.values()),
        missing=tuple(dict.fromkeys(their for name, their in theirs.items() if name not in found)),
        findings=tuple(_config(config, found, version, n_layer)),
        facts=config,
    )


_STATE = re.compile(r"model\.layers\.(\d+)\.attn\.recurrent_state")


def read_state(path: Path) -> Contents:
    """A tuned state as fla has it in its cache, (1, H, N, N) a block, rows are keys; brought to rows that are values.

    Raises:
        Unreadable: it is none.
    """
    held, _ = safetensors_file.tensors(path)
    found, wrong = dict[str, Stored](), list[tuple[str, str, str]]()
    for name, x in held.items():
        number = _STATE.fullmatch(name)
        if number is None or x.raw.ndim != 4 or len(x.raw) != 1:
            raise Unreadable(f"{name} {x.shape} is no model.layers.N.attn.recurrent_state of one sequence")
        found[f"blocks.{number[1]}.att.time_state"] = x._replace(raw=x.raw[0], turned=True)
        if x.kind != "F32":
            wrong.append(("dtype", f"{name} is {x.kind}", "F32, as fla keeps its states"))
    return state(found, wrong)


def _smaller(config: dict[str, Any]) -> dict[str, float]:
    """The RWKV-6 of fla has no divisor of the head's output: files for it have what makes that output smaller instead."""
    return (
        {"att.receptance.weight": float(config.get("head_size_divisor", 1.0))}
        if config["model_type"] == "rwkv6"
        else {}
    )


def _as_official(name: str, x: Stored, version: str) -> Stored:
    """A tensor of the library, in the official orientation."""
    inner = _inner(name)
    if version == "6" and inner in tuple(f"att.time_maa_{one}" for one in _FIVE):
        return x._replace(raw=x.raw[_FIVE.index(inner[-1])])
    if version == "6" and inner == "att.time_maa_w1":  # (5D, C)
        five = x.raw.reshape(5, -1, x.raw.shape[-1])[_OURS]
        return x._replace(raw=five.reshape(x.raw.shape), turned=True)
    if version == "6" and inner == "att.time_maa_w2":  # (C, 5D) -> (5, D, C)
        return x._replace(raw=np.moveaxis(x.raw.reshape(len(x.raw), 5, -1), 0, -1)[_OURS])
    return x._replace(turned=inner in _TURNED.get(version, ()))


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


def _config(
    config: dict[str, Any], found: dict[str, Stored], version: str, n_layer: int
) -> Iterator[tuple[str, str, str]]:
    """What of config.json does not fit the tensors."""
    said: dict[str, Any] = {"architectures": [_ARCHITECTURES[str(config["model_type"])]], "tie_word_embeddings": False}
    if "emb.weight" in found:
        said["vocab_size"], said["hidden_size"] = found["emb.weight"].shape
    if "blocks.0.ffn.key.weight" in found:
        said["intermediate_size"] = found["blocks.0.ffn.key.weight"].shape[0]
    if "blocks.0.att.r_k" in found:
        said["head_dim"] = found["blocks.0.att.r_k"].shape[1]
    if "blocks.0.att.time_faaaa" in found:
        said["num_heads"] = found["blocks.0.att.time_faaaa"].shape[0]
    for key, (name, dimension) in _RANKS[version].items():
        x = found.get(f"blocks.{1 if name == 'att.v1' and n_layer > 1 else 0}.{name}")
        if x is not None:
            said[key] = x.shape[dimension]
    for key, value in said.items():
        if config.get(key) != value:
            rule = f"{json.dumps(value)}, as the tensors say" if key != "architectures" else json.dumps(value)
            yield f"config.json: {key}", json.dumps(config.get(key)), rule
    layers = layout.layers(found)
    if layers != n_layer:
        yield "config.json: num_hidden_layers", str(n_layer), f"{layers}, as the tensors say"


def _inner(name: str) -> str:
    """blocks.3.att.w1 -> att.w1."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


_RENAMED_4 = {
    "emb": "embeddings", "att": "attention", "ffn": "feed_forward", "ln0": "pre_ln", "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance",
}  # fmt: skip


def _theirs(name: str, version: str) -> str:
    if version == "4":
        renamed = ".".join(_RENAMED_4.get(part, part) for part in name.split("."))
        return renamed if name == "head.weight" else f"rwkv.{renamed}"
    if not name.startswith("blocks."):
        return _FLA_OUTSIDE[name]
    _, layer, inner = name.split(".", 2)
    return f"model.layers.{layer}.{_FLA[version][inner]}"


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
