"""Reads a GGUF by the rules of llama.cpp's loader: names and shapes of rwkv6 and rwkv7, their metadata, and the tokens.

Source: llama.cpp: src/models/rwkv6.cpp and rwkv7.cpp (load_arch_hparams, load_arch_tensors), src/llama-arch.cpp (names),
src/llama-vocab.cpp (llama_unescape_rwkv_token). A shape is given as numpy sees it, the reverse of ggml's ne.
"""

from pathlib import Path
from typing import Any

from rwkv_core.conformance import gguf_container, layout
from rwkv_core.conformance.contents import Contents, Stored, Unreadable

_NORMS = {"ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln"}
_SHARED = (
    {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in _NORMS.items() for part in ("weight", "bias")}
    | {f"att.{one}.weight": f"time_mix_{one}.weight" for one in ("receptance", "key", "value", "output", "gate")}
    | {f"ffn.{one}.weight": f"channel_mix_{one}.weight" for one in ("receptance", "key", "value")}
)
_BLOCKS = {
    "6": _SHARED | {
        "att.time_maa_x": "time_mix_lerp_x.weight",
        "att.time_maa_w1": "time_mix_w1.weight", "att.time_maa_w2": "time_mix_w2.weight",
        "att.time_decay": "time_mix_decay.weight", "att.time_faaaa": "time_mix_first.weight",
        "att.time_decay_w1": "time_mix_decay_w1.weight", "att.time_decay_w2": "time_mix_decay_w2.weight",
        "ffn.time_maa_k": "channel_mix_lerp_k.weight", "ffn.time_maa_r": "channel_mix_lerp_r.weight",
    },
    "7": _SHARED | {f"att.{x}{i}": f"time_mix_{x}{i}.weight" for x in "wav" for i in "012"} | {
        "att.g1": "time_mix_g1.weight", "att.g2": "time_mix_g2.weight",
        "att.k_k": "time_mix_k_k.weight", "att.k_a": "time_mix_k_a.weight", "att.r_k": "time_mix_r_k.weight",
        "ffn.x_k": "channel_mix_lerp_k.weight",
    },
}  # fmt: skip
_OUTSIDE = {
    "emb.weight": "token_embd.weight", "head.weight": "output.weight",
    "ln_out.weight": "output_norm.weight", "ln_out.bias": "output_norm.bias",
    "blocks.0.ln0.weight": "token_embd_norm.weight", "blocks.0.ln0.bias": "token_embd_norm.bias",
}  # fmt: skip
_TURNED = {
    "6": ("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2"),
    "7": tuple(f"att.{pair}{i}" for pair in "wavg" for i in "12"),
}
_FUSED = {"6": [f"att.time_maa_{one}" for one in "wkvrg"], "7": [f"att.x_{one}" for one in layout.LERPS]}
_LERP = "time_mix_lerp_fused.weight"
_RANKS = {
    "6": {"time_mix_extra_dim": ("att.time_maa_w2", 1), "time_decay_extra_dim": ("att.time_decay_w1", 1)},
    "7": {
        "attention.decay_lora_rank": ("att.w1", 1), "attention.iclr_lora_rank": ("att.a1", 1),
        "attention.value_residual_mix_lora_rank": ("att.v1", 1), "attention.gate_lora_rank": ("att.g1", 1),
    },
}  # fmt: skip


def read(path: Path) -> Contents:
    """A model as llama.cpp finds it.

    Raises:
        Unreadable: it would not load it.
    """
    facts, held = gguf_container.read(path)
    arch = str(facts.get("general.architecture"))
    if arch not in ("rwkv6", "rwkv7"):
        raise Unreadable(f"its architecture is {arch}; rwkv6 and rwkv7 are RWKV's")
    version = arch[-1]
    n_layer = int(facts.get(f"{arch}.block_count", 0))
    found, used = dict[str, Stored](), set[str]()
    for ours, theirs in _OUTSIDE.items():
        if theirs in held:
            found[ours] = held[theirs]
            used.add(theirs)
    for i in range(n_layer):
        for ours, theirs in _BLOCKS[version].items():
            name = f"blk.{i}.{theirs}"
            if name in held:
                found[f"blocks.{i}.{ours}"] = held[name]._replace(turned=ours in _TURNED[version])
                used.add(name)
        fused = held.get(f"blk.{i}.{_LERP}")
        if fused is not None:
            used.add(f"blk.{i}.{_LERP}")
            for part, ours in zip(fused.raw, _FUSED[version], strict=False):
                found[f"blocks.{i}.{ours}"] = fused._replace(raw=part)
    wanted = layout.names(version, n_layer)  # here RWKV-7's unused ones must be there
    lost = dict.fromkeys(_theirs(name, version) for name in wanted if name not in found)
    size = int(facts.get(f"{arch}.wkv.head_size", 0))
    channels = int(facts.get(f"{arch}.embedding_length", 0))
    if not size or not channels or channels % size:
        raise Unreadable(f"its head size is {size} of {channels} channels")
    return Contents(
        version,
        n_layer,
        found,
        heads=channels // size,
        rescale=int(facts.get(f"{arch}.rescale_every_n_layers", 0)),
        norm_eps=float(facts.get(f"{arch}.attention.layer_norm_epsilon", 0.0)),
        unexpected=tuple(name for name in held if name not in used),
        missing=tuple(lost),
        findings=tuple(_metadata(facts, found, version, n_layer)),
        facts=facts,
    )


def _theirs(name: str, version: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, inner = name.split(".", 2)
    return f"blk.{layer}.{_LERP if inner in _FUSED[version] else _BLOCKS[version][inner]}"


def _metadata(
    facts: dict[str, Any], found: dict[str, Stored], version: str, n_layer: int
) -> list[tuple[str, str, str]]:
    """What of the metadata does not fit the tensors, or what llama.cpp has built in."""
    arch, wrong = f"rwkv{version}", list[tuple[str, str, str]]()

    def same(key: str, want: Any) -> None:
        got = facts.get(f"{arch}.{key}")
        if got != want:
            wrong.append((f"{arch}.{key}", str(got), f"{want}, as the tensors say"))

    layers = layout.layers(found)
    if layers != n_layer:
        wrong.append((f"{arch}.block_count", str(n_layer), f"{layers}, as the tensors say"))
    if "emb.weight" in found:
        same("embedding_length", found["emb.weight"].shape[1])
    if "blocks.0.ffn.key.weight" in found:
        same("feed_forward_length", found["blocks.0.ffn.key.weight"].shape[0])
    for key, (name, dimension) in _RANKS[version].items():
        layer = 1 if name == "att.v1" and n_layer > 1 else 0
        tensor = found.get(f"blocks.{layer}.{name}")
        if tensor is not None and len(tensor.shape) > dimension:
            same(key, tensor.shape[dimension])
    eps = facts.get(f"{arch}.attention.layer_norm_epsilon")
    if eps is None or abs(eps - 1e-5) > 1e-9:
        wrong.append((f"{arch}.attention.layer_norm_epsilon", str(eps), "1e-05, as every RWKV has it"))
    for i in "12" if version == "7" else "":  # unused, and yet of the rank of another pair
        unused, pair = (found.get(f"blocks.0.att.{x}{i}") for x in "va")
        if unused is not None and pair is not None and unused.shape != pair.shape:
            wrong.append((f"blk.0.time_mix_v{i}", str(unused.shape), f"{pair.shape}, as of blk.0.time_mix_a{i}"))
    if version == "6" and "blocks.0.att.time_faaaa" in found:
        same("wkv.head_size", found["blocks.0.att.time_faaaa"].shape[1])
    return wrong


def unescaped(text: str) -> bytes:
    """The bytes of a token as llama.cpp reads its text: with t, n, r, xhh, or what stands for itself behind a backslash."""
    made, data, i = bytearray(), text.encode("utf-8", "surrogateescape"), 0
    while i < len(data):
        if data[i] != 0x5C or i + 1 == len(data):
            if data[i] != 0x5C:
                made.append(data[i])
            i += 1
        elif data[i + 1] == ord("x"):
            digits = [d - 87 if d >= 97 else d - 48 for d in data[i + 2 : i + 4]]
            if len(digits) == 2:
                made.append((16 * digits[0] + digits[1]) & 0xFF)
            i += 4
        else:
            made.append({ord("t"): 9, ord("n"): 10, ord("r"): 13}.get(data[i + 1], data[i + 1]))
            i += 2
    return bytes(made)
