"""Which clients can mount a file of a state, and if not, why: by the rules that they read it with.

RWKV Runner   a .pth, exactly one tensor a block, H * N = C of the model that runs; any precision, read as float32; CUDA and CPU
              modes alone. backend-python/utils/rwkv.py of josStorer/RWKV-Runner.
rwkv package  reads no state file for RWKV-7: its tensors are put into generate_zero_state() by hand, as float32.
Ai00          safetensors in float16, the last two axes turned around, the name ending in .state; web-rwkv reads the same.
              assets/scripts/convert_safetensors.py and src/runtime of cryscan/web-rwkv.
llama.cpp     and what is built on it has no file for a state.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_core.errors import InputError
from rwkv_core.formats import container, tuned_state
from rwkv_core.models.skeleton import Shape

_MAKE_PTH, _MAKE_ST = (
    f"`rwkvflow export FILE FOLDER --format {form}` makes such a file of it" for form in ("pth", "st")
)

_LARGEST = float(torch.finfo(torch.float16).max)


class Verdict(NamedTuple):
    """What a client does with a file."""

    client: str
    mounts: bool
    says: str
    """How it is mounted there; or why it is not, and what to do."""


def check(path: Path, shape: Shape | None = None) -> list[Verdict]:
    """The verdict of each client.

    Args:
        path: a file of a state.
        shape: of the model that it is to be mounted on; None: what only the model tells is left open.

    Raises:
        InputError: it can't be read, or has no state at all.
    """
    tensors = container.read(path)
    if not any(tuned_state.is_part(name) for name in tensors):
        raise InputError(str(path), "has no blocks.0.att.time_state, so it is no state", "give a state's file")
    fault = _fault(tensors, shape)
    turned = path.suffix in container.SAFETENSORS
    return [
        _runner(path, tensors, fault, turned),
        _package(fault, turned, shape),
        _ai00(path, tensors, fault, turned),
        _ours(tensors, fault),
        Verdict("llama.cpp, Ollama", False, "they have no file for a state"),
    ]


def _fault(tensors: dict[str, Tensor], shape: Shape | None) -> str | None:
    """What keeps every client from mounting it; the token shift aside."""
    if shape is not None and shape.version == "4":
        return "the model is an RWKV-4, which has no matrix for a state; take the model that it was made with"
    states = tuned_state.for_clients(tensors)
    layers = len(states) if shape is None else shape.n_layer
    missing = [name for i in range(layers) if (name := f"blocks.{i}.{tuned_state.WKV}") not in states]
    if missing:
        return f"{missing[0]} is missing; give a whole state{'' if shape is None else f', of {layers} blocks'}"
    if len(states) > layers:
        return f"it is of {len(states)} blocks, and the model has {layers}; give a state made with this model"
    heads = states[f"blocks.0.{tuned_state.WKV}"].shape
    if shape is not None:
        heads = torch.Size([shape.dim_att // shape.head_size, shape.head_size, shape.head_size])
    for name, x in states.items():
        if x.shape != heads or len(heads) != 3 or heads[1] != heads[2]:
            whose = "the first block's is" if shape is None else "the model's is"
            return f"{name} is {tuple(x.shape)}, and {whose} {tuple(heads)}; give a state made with this model"
        if not bool(torch.isfinite(x).all()):
            return f"{name} has a value that is no number; train or make it anew"
    return None


def _extra(tensors: dict[str, Tensor]) -> str | None:
    """A tensor that clients do not expect."""
    return next((name for name in tensors if not name.endswith(f".{tuned_state.WKV}")), None)


def _runner(path: Path, tensors: dict[str, Tensor], fault: str | None, turned: bool) -> Verdict:
    name, extra = "RWKV Runner", _extra(tensors)
    if fault is not None:
        return Verdict(name, False, fault)
    if turned or path.suffix != ".pth":
        return Verdict(name, False, f"it reads states from .pth alone; {_MAKE_PTH}")
    if extra is not None:
        rule = f"it counts the tensors, and {extra} is one too many"
        return Verdict(name, False, f"{rule}; {_MAKE_PTH}")
    return Verdict(name, True, "choose it as State Model, in a mode that is not WebGPU")


def _package(fault: str | None, turned: bool, shape: Shape | None) -> Verdict:
    name = "rwkv package"
    if fault is not None:
        return Verdict(name, False, fault)
    if turned:
        return Verdict(name, False, f"the matrices are turned around in this format; {_MAKE_PTH}")
    by_hand = "by hand: float32, at place 3 * i + 1 of generate_zero_state()"
    older = ", turned around for RWKV-5 and 6"
    if shape is not None:
        older = "" if shape.version == "7" else ", turned around: x.transpose(1, 2)"
    return Verdict(name, True, by_hand + older)


def _ai00(path: Path, tensors: dict[str, Tensor], fault: str | None, turned: bool) -> Verdict:
    name, extra = "Ai00, web-rwkv", _extra(tensors)
    if fault is not None:
        return Verdict(name, False, fault)
    largest = max(float(x.abs().max()) for x in tensors.values())
    if largest > _LARGEST:
        rule = f"it holds states in float16, which ends at {_LARGEST:g}, and a value is {largest:g}"
        return Verdict(name, False, f"{rule}; train with a smaller learning rate")
    if not turned:
        return Verdict(name, False, f"it reads safetensors in float16, turned around; {_MAKE_ST}")
    if extra is not None:
        return Verdict(name, False, f"{extra} is nothing that it mounts; {_MAKE_ST}")
    other = next((x.dtype for x in tensors.values() if x.dtype != torch.float16), None)
    if other is not None:
        return Verdict(name, False, f"it reads float16, and this is {str(other).removeprefix('torch.')}; {_MAKE_ST}")
    if path.suffix != ".state":
        return Verdict(name, False, "it takes a name that ends in .state; rename it")
    return Verdict(name, True, "name it under [[state]] in Config.toml; that it is turned around can't be seen in it")


def _ours(tensors: dict[str, Tensor], fault: str | None) -> Verdict:
    name, others = "RWKV-Flow", [x for x in tensors if not tuned_state.is_part(x)]
    if fault is not None:
        return Verdict(name, False, fault)
    if others:
        return Verdict(name, False, f"{others[0]} is no part of a state; merge the adapter, or mount it by --adapter")
    how = "with its token shift" if _extra(tensors) else "without token shift, as clients"
    return Verdict(name, True, f"rwkvflow chat --state, serve --state: {how}")
