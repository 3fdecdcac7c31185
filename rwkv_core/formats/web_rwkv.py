"""web-rwkv's and Ai00's .st: safetensors in float16, low-rank pairs and states turned around, some names changed.

Shapes: C channels, D a low rank, H heads, N head size.
Source: the convert_safetensors.py that cryscan/web-rwkv, Ai00 and RWKV Runner share, and what cryscan/web-rwkv's
src/runtime/loader.rs takes.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_core.errors import InputError
from rwkv_core.files import whole_file
from rwkv_core.formats import container

_TURNED = (".w1", ".w2", ".a1", ".a2", ".g1", ".g2", ".v1", ".v2", "_w1", "_w2", ".time_state")
_PAIR_7 = re.compile(r"blocks\.\d+\.att\.[wavg]([12])")
_TIME = re.compile(r"blocks\.\d+\.att\.time_(decay|faaaa|first)")


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint's tensors as .st. What float16 can't hold becomes infinite: check before.

    Raises:
        InputError: web-rwkv has no such model.
        WorldError: there is no room, or no permission.
    """
    converted = from_official(tensors)
    about = {name: (x.shape, torch.float16) for name, x in converted.items()}
    with whole_file(path) as temporary:
        container.write_safetensors(temporary, about, (x for _, x in container.one_by_one(converted)))


def check(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what web-rwkv would not load.

    Raises:
        InputError: it has no such model.
    """
    converted = from_official(tensors)
    of_7 = any(name.endswith(".att.x_r") for name in converted)
    if of_7 and "blocks.1.att.v1" not in converted:
        raise InputError(
            "st of an RWKV-7 of one layer", "web-rwkv looks for a rank in the second", "export pth or gguf"
        )
    heads = next((x.shape for name, x in converted.items() if of_7 and name.endswith(".att.r_k")), (0, 64))
    if heads[1] % 4:
        raise InputError(f"st of heads of {heads[1]}", "web-rwkv reads four channels at a time", "export pth")


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint under web-rwkv's names and in its shapes; RWKV-5.1 with a decay and a bonus for each channel, as in 5.2.

    Raises:
        InputError: it is an RWKV-5.0, or a 5.1 whose bonus is a logarithm.
    """
    per_head = _version_5(tensors) and any(_TIME.fullmatch(name) and x.ndim == 1 for name, x in tensors.items())
    if per_head and ("blocks.0.att.gate.weight" not in tensors or "blocks.0.att.time_first" in tensors):
        raise InputError(
            "an RWKV-5.0, or 5.1 with time_first", "web-rwkv reads neither, and takes them for others", "export pth"
        )
    converted: dict[str, Tensor] = {}
    for name, x in tensors.items():
        theirs = name.replace("time_faaaa", "time_first").replace("time_maa", "time_mix").lower()
        if per_head and _TIME.fullmatch(name):
            x = x[:, None].expand(-1, tensors["emb.weight"].shape[1] // len(x))
        converted[theirs] = x.mT if theirs.endswith(_TURNED) else x
    return converted


def is_one(tensors: Mapping[str, Tensor], extension: str) -> bool:
    """Whether tensors are web-rwkv's rather than official: by names in RWKV-5 and 6, by the shapes of the pairs in RWKV-7.

    Where both would be the same, as in RWKV-4, or where a rank is C, the extension says it.
    """
    if any(".time_maa_" in name or name.endswith(".time_faaaa") for name in tensors):
        return False
    if any(name.endswith(".time_mix_w1") for name in tensors):
        return True
    if _version_5(tensors):
        return any(name.endswith(".time_first") and x.ndim == 2 for name, x in tensors.items()) or extension == ".st"
    channels = tensors["emb.weight"].shape[-1] if "emb.weight" in tensors and tensors["emb.weight"].ndim else 0
    votes = 0
    for name, x in tensors.items():
        found = _PAIR_7.fullmatch(name)
        if found is not None and x.ndim == 2:
            # official: (C, D), then (D, C)
            first, last = x.shape if found[1] == "1" else x.shape[::-1]
            votes += (last == channels) - (first == channels)
    return votes > 0 or (votes == 0 and extension in (".st", ".state"))


def to_official(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a .st under the official names and in the official shapes: the inverse of `from_official`.

    Raises:
        InputError: it is an RWKV-5.0, or a 5.1 whose bonus may be a logarithm.
    """
    of_5, of_6 = _version_5(tensors), any(name.endswith(".time_mix_w1") for name in tensors)
    official: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if of_5 and name.endswith(".time_first") and x.ndim == 1:
            raise InputError(
                f"{path}: {name} has a value a head", "in a .st it can be a bonus or its logarithm", "give the .pth"
            )
        ours = name.replace(".time_first", ".time_faaaa") if of_5 or of_6 else name
        ours = ours.replace(".time_mix_", ".time_maa_") if of_6 else ours
        official[ours] = x.mT.contiguous() if name.endswith(_TURNED) and x.ndim > 1 else x
    times = {name: x for name, x in official.items() if of_5 and _TIME.fullmatch(name)}
    if all(x.ndim == 2 and x.shape[1] > 1 and torch.equal(x[:, :1].expand_as(x), x) for x in times.values()):
        official |= {name: x[:, 0].clone() for name, x in times.items()}  # 5.1's, which were repeated
    return official


def _version_5(names: Mapping[str, Tensor]) -> bool:
    others = any(".time_maa_" in name or name.endswith(("time_mix_w1", "att.x_r")) for name in names)
    return "blocks.0.att.ln_x.weight" in names and not others
