"""Reads a .st by the rules of web-rwkv's loader, which Ai00 and RWKV Runner's WebGPU have too.

All tensors are float16; a matrix is (out, in), so the pairs of low rank are turned; what RWKV-6 calls time_maa is time_mix,
the bonus of RWKV-5 and 6 is time_first; a state's rows are keys.
Source: cryscan/web-rwkv, src/runtime/loader.rs (Loader::info, load_matrix_f16, lora_matrices), src/runtime/v4.rs to v7.rs.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from rwkv_core.conformance import layout, safetensors_file
from rwkv_core.conformance.contents import Array, Contents, Stored, Unreadable
from rwkv_core.conformance.pth import state

_ASKED = {
    "4": "time_decay time_first time_mix_k time_mix_v time_mix_r",
    "5": "gate.weight ln_x.weight ln_x.bias",
    "6": "time_mix_x time_mix_w time_mix_k time_mix_v time_mix_r time_mix_g time_mix_w1 time_mix_w2 "
    "time_decay_w1 time_decay_w2",
    "7": "x_r x_w x_k x_v x_a x_g w0 w1 w2 a0 a1 a2 g1 g2 r_k k_k k_a",
}
_MATRICES = ("key.weight", "value.weight", "receptance.weight", "gate.weight", "output.weight")
_TURNED = {
    "6": ("att.time_maa_w1", "att.time_maa_w2", "att.time_decay_w1", "att.time_decay_w2"),
    "7": tuple(f"att.{pair}{i}" for pair in "wavg" for i in "12"),
}


def read(path: Path) -> Contents:
    """A model as web-rwkv finds it.

    Raises:
        Unreadable: it would not load it.
    """
    held, _ = safetensors_file.tensors(path)
    names = {
        version for version, asked in _ASKED.items() if all(f"blocks.0.att.{name}" in held for name in asked.split())
    }
    version = next((v for v in "7654" if v in names), None)
    if version is None or (version == "4" and "blocks.0.att.ln_x.weight" in held):
        raise Unreadable("its names are of no version that web-rwkv knows (Loader::info: invalid model version)")
    n_layer = layout.layers(held)
    if version == "7" and "blocks.1.att.v1" not in held:
        raise Unreadable("blocks.1.att.v1 is missing: web-rwkv reads a rank from it, so RWKV-7 needs two blocks")
    wanted = layout.names(version, n_layer)
    theirs = {name: _theirs(name, version) for name in wanted}
    found = {
        name: held[their]._replace(turned=name.partition(".")[2].partition(".")[2] in _TURNED.get(version, ()))
        for name, their in theirs.items()
        if their in held
    }
    own = "blocks.0.att.r_k" if version == "7" else "blocks.0.att.time_faaaa"
    return Contents(
        version,
        n_layer,
        found,
        heads=found[own].shape[0] if version != "4" else 1,
        unexpected=tuple(name for name in held if name not in theirs.values()),
        missing=tuple(theirs[name] for name in wanted if name not in found and name not in layout.UNUSED),
        findings=tuple(_of_float16(held)),
    )


def read_state(path: Path) -> Contents:
    """A tuned state, brought to rows that are values.

    Raises:
        Unreadable: it is none.
    """
    held, _ = safetensors_file.tensors(path)
    turned = {name: x._replace(turned=True) for name, x in held.items()}
    return state(turned, list(_of_float16(held)))


def with_lora(model: Contents, path: Path, alpha: float) -> Contents:
    """What web-rwkv has in memory once it has blended a LoRA into a model.

    Args:
        model: from `read`.
        path: the LoRA's file.
        alpha: of the entry that names it: matrices become W + alpha / rank B A; a vector in the file replaces the model's.

    Raises:
        Unreadable: a pair is not whole, or fits no matrix.
    """
    held, _ = safetensors_file.tensors(path)
    blended, used = dict(model.tensors), set[str]()
    for name, x in model.tensors.items():
        module, their = name.removesuffix(".weight"), _theirs(name, model.version)
        first, second = (f"{module}.lora.{i}" for i in "01")
        if name.endswith(_MATRICES) and first in held and second in held:
            a, b = held[first].values(), held[second].values()  # (in, rank), for its converter turns it; (out, rank)
            if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or (len(b), len(a)) != x.shape:
                raise Unreadable(f"{first} {a.shape} and {second} {b.shape} do not fit {name} {x.shape}")
            change = np.float32(alpha / a.shape[1]) * (b @ a.T)
            blended[name] = _changed(x, x.values() + change)
            used |= {first, second}
        elif their in held:
            other = held[their]
            if x.values().ndim > 1 and min(x.shape) > 1:
                blended[name] = _changed(x, x.values() + np.float32(alpha) * np.reshape(other.values(), x.shape))
            else:
                blended[name] = _changed(x, np.reshape(other.values(), x.shape))
            used.add(their)
    ignored = tuple(sorted(held.keys() - used))
    findings = (*model.findings, *_of_float16(held))
    return replace(model, tensors=blended, unexpected=(*model.unexpected, *ignored), findings=findings)


def _changed(x: Stored, values: Array) -> Stored:
    """Other values in a tensor's place, in the official orientation, as float16 holds them."""
    return Stored(values.astype(np.float16), "F16")


def _theirs(name: str, version: str) -> str:
    """What web-rwkv calls a tensor."""
    if version == "6":
        name = name.replace(".time_maa_", ".time_mix_")
    return name.replace(".time_faaaa", ".time_first")


def _of_float16(held: Mapping[str, Stored]) -> list[tuple[str, str, str]]:
    other = [name for name, x in held.items() if x.kind != "F16"]
    if not other:
        return []
    return [("all is float16", f"{len(other)} tensors are not, such as {other[0]}", "web-rwkv takes no other")]
