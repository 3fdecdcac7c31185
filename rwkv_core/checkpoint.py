"""RWKV checkpoints: tensors under the official names, in the official shapes and orientation, whatever form they come in.

A .pth file is a dictionary of such tensors, and nothing else; `rwkv_core.formats` has the other forms.
"""

import ctypes
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rwkv_core.errors import InputError
from rwkv_core.files import whole_file
from rwkv_core.formats import container, huggingface, order, parts, web_rwkv

Dtype = Literal["as_loaded", "bf16", "fp16", "fp32"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_PREFIXES = ("_forward_module.", "base_model.model.", "model.")  # DeepSpeed's, Hugging Face PEFT's, Lightning's


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU, in their dtypes, mapped rather than loaded where possible.

    They are in the order of the .pth file, or of the official one where the form keeps none. Prefixes that trainers leave
    before the names are removed.

    Args:
        path: a .pth, .safetensors, web-rwkv's .st, a Hugging Face folder, or a part or the index or the folder of one in parts.

    Raises:
        InputError: nothing is there, a part is missing, it is cut short, damaged or no checkpoint, or would run code.
    """
    files, promised = parts.find(path)
    tensors: dict[str, Tensor] = {}
    ordered = len(files) == 1 and files[0].suffix not in container.SAFETENSORS
    for file in files:
        held = container.read(file)
        for name, x in held.items():
            for official, y in huggingface.to_official(stripped(name), x):
                if official in tensors:
                    raise InputError(f"{file}: {name!r}", "two entries are this tensor", "give the model file itself")
                tensors[official] = y
                ordered &= name.endswith(official)
        promised -= held.keys()
    if promised:
        some = ", ".join(sorted(promised)[:3])
        raise InputError(f"{path}: {some}", "the index has it, and no part does", "download the checkpoint again")
    extension = files[0].suffix
    if extension in container.SAFETENSORS and web_rwkv.is_one(tensors, extension):
        tensors = web_rwkv.to_official(tensors, path)
    return tensors if ordered else order.official(tensors)


def stripped(name: str) -> str:
    """The name of a tensor without what trainers leave before it."""
    found = True
    while found:
        found = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, found = name.removeprefix(prefix), True
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


def convert(tensors: dict[str, Tensor], dtype: torch.dtype | None, device: str = "cpu") -> None:
    """Bring tensors to a dtype (None: leave it) and a device, in place of those given, one at a time.

    What a mapped file had to bring into memory for a tensor is let go, so no second copy of the model is ever there.
    """
    mapped = _mapped_files()
    for name in list(tensors):
        x = tensors[name]
        tensors[name] = x.to(device=device, dtype=dtype or x.dtype)
        if tensors[name] is not x:
            _let_go(x, mapped)


def let_go(x: Tensor) -> None:
    """Give back what a mapped file had to bring into memory for `x`. If it is read again, that comes from the file again."""
    _let_go(x, _mapped_files())


def _mapped_files() -> list[tuple[int, int]]:
    """Where in memory files are mapped, where Linux says it; else nowhere."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
    regions = [line.split(maxsplit=5) for line in lines]
    return [
        (int(fields[0].split("-")[0], 16), int(fields[0].split("-")[1], 16))
        for fields in regions
        if len(fields) == 6 and fields[5].startswith("/") and not fields[1].endswith("s")  # privately, as torch maps
    ]


def _let_go(x: Tensor, mapped: list[tuple[int, int]]) -> None:
    """Give back the pages that only `x` is on. If it is read again, they come from the file again."""
    page = mmap.PAGESIZE
    begin, end = x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
    first, last = -(-begin // page) * page, end // page * page
    if last > first and any(low <= begin and end <= high for low, high in mapped):
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


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
