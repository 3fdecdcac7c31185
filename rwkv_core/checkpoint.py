"""Official RWKV checkpoints: a .pth file is a dictionary of tensors under the official names, and nothing else.

Read memory-mapped and with `weights_only=True`: a file can hold no code that runs.
"""

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rwkv_core.errors import InputError
from rwkv_core.files import whole_file

Dtype = Literal["as_loaded", "bf16", "fp16", "fp32"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_PREFIXES = ("_forward_module.", "base_model.model.", "model.")  # DeepSpeed's, Hugging Face PEFT's, Lightning's


class Shape(NamedTuple):
    """What a checkpoint's tensors say about the model: nobody types these."""

    version: str
    n_layer: int
    n_embd: int
    head_size: int
    vocab_size: int
    dim_ffn: int
    decay_rank: int
    """Hidden size of w1, w2; and so on for a, v, g."""
    a_rank: int
    v_rank: int
    gate_rank: int
    value_residual_in_layer_0: bool
    """Whether blocks.0.att has v0, v1, v2. They are never used, and kept."""


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, on the CPU, in the file's order and dtypes, mapped rather than loaded where possible.

    Prefixes that trainers leave before the names are removed.

    Raises:
        InputError: there is no such file, it is cut short or no checkpoint, or its pickle asks for code to run.
    """
    if not path.is_file():
        raise InputError(str(path), "no checkpoint is there", "correct the path, or download the model to it")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise _unreadable(path, error) from None
        raise InputError(
            f"{path}: its pickle asks for {found[1]}",
            "a checkpoint holds tensors only, and loading one must not run code",
            "do not trust this file; get the model from its publisher",
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise _unreadable(path, error) from None
    if not isinstance(tensors, dict) or not tensors:
        raise InputError(f"{path}: holds a {type(tensors).__name__}", "must be names with tensors", "give an RWKV .pth")
    official: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise InputError(
                f"{path}: {name!r} is a {type(x).__name__}",
                "every entry must be a tensor under a name",
                "give the model file itself",
            )
        if _official(name) in official:
            raise InputError(f"{path}: {name!r}", "two entries are this tensor", "give the model file itself")
        official[_official(name)] = x
    return official


def _unreadable(path: Path, error: Exception) -> InputError:
    size = path.stat().st_size
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return InputError(
        f"{path}: {size} bytes that can't be read ({reason})", "the file is cut short or no .pth", "download it again"
    )


def _official(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name


def write(path: Path, tensors: Mapping[str, Tensor], dtype: Dtype = "as_loaded") -> None:
    """Save tensors as a .pth file that appears whole or not at all, each in storage of its own.

    The bytes depend on the tensors alone: equal models are equal files.

    Raises:
        WorldError: there is no room, or no permission.
    """
    saved: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, x in tensors.items():
        x = x.detach().cpu()
        if dtype != "as_loaded" and x.is_floating_point():
            x = x.to(DTYPES[dtype])
        plain = x.stride() == torch.empty(x.shape, device="meta").stride()  # is_contiguous() overlooks sides of 1
        whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        if not (plain and whole) or x.untyped_storage().data_ptr() in storages:
            x = x.clone(memory_format=torch.contiguous_format)
        storages.add(x.untyped_storage().data_ptr())
        saved[name] = x
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(saved, file)  # a file object, not a name: the name would be part of the bytes


def check_values(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Refuse what no client could use: values that are no numbers, or that `dtype` can't hold; None is each tensor's own.

    Raises:
        InputError: there is such a value.
    """
    for name, x in tensors.items():
        if not x.is_floating_point() or not x.numel():
            continue
        kind, largest = dtype or x.dtype, float(x.abs().max())  # NaN if there is one
        if not math.isfinite(largest):
            raise InputError(
                f"{name} has a value of {largest}", "all must be finite", "this model is broken: train it anew"
            )
        if largest > torch.finfo(kind).max:
            precision = str(kind).removeprefix("torch.")
            raise InputError(
                f"{name} has a value of {largest:g}",
                f"{precision} ends at {torch.finfo(kind).max:g}",
                "export pth in bf16 or fp32",
            )


def shape(tensors: Mapping[str, Tensor], path: Path) -> Shape:
    """Version and sizes of an RWKV-7 checkpoint, from its names and shapes.

    Raises:
        InputError: it is another model, or a tensor is missing.
    """
    version = _version(tensors)
    if version != "7":
        known = f"is RWKV-{version}" if version else f"has no RWKV names ({', '.join(list(tensors)[:3])}, ...)"
        raise InputError(f"{path} {known}", "model.base must be RWKV-7 (x070)", "give an RWKV-x070 checkpoint")
    try:
        vocab_size, n_embd = tensors["emb.weight"].shape
        n_layer = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        # the value residual begins in layer 1: a model of one layer has none that counts
        v_layer = 1 if n_layer > 1 else 0
        v1 = tensors.get(f"blocks.{v_layer}.att.v1")
        heads, head_size = tensors["blocks.0.att.r_k"].shape
        found = Shape(
            version=version,
            n_layer=n_layer,
            n_embd=n_embd,
            head_size=head_size,
            vocab_size=vocab_size,
            dim_ffn=tensors["blocks.0.ffn.key.weight"].shape[0],
            decay_rank=tensors["blocks.0.att.w1"].shape[1],
            a_rank=tensors["blocks.0.att.a1"].shape[1],
            v_rank=v1.shape[1] if v1 is not None else 0,
            gate_rank=tensors["blocks.0.att.g1"].shape[1],
            value_residual_in_layer_0="blocks.0.att.v0" in tensors,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{path}: {error}", "an RWKV-7 checkpoint must have it", "give a whole checkpoint") from None
    if heads * head_size != n_embd:
        raise InputError(
            f"{path}: blocks.0.att.r_k is ({heads}, {head_size})",
            f"its heads must share the {n_embd} channels",
            "give a whole checkpoint",
        )
    return found


def _version(names: Mapping[str, Tensor]) -> str:
    if "blocks.0.att.r_k" in names:
        if "blocks.0.ffn.s_emb.weight" in names:
            return "7a (DeepEmbed)" if "blocks.0.qkv.q.weight" not in names else "7b (DeepEmbed attention)"
        return "7"
    if any("time_maa" in name for name in names):
        return "6"
    if "blocks.0.att.ln_x.weight" in names:
        return "5"
    return "4" if "blocks.0.att.time_first" in names else ""
