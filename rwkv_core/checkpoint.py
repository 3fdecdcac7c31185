"""RWKV checkpoints: tensors under the official names, in the official shapes and orientation, whatever form they come in.

A .pth file is a dictionary of such tensors, and nothing else; `rwkv_core.formats` has the other forms.
"""

import math
import mmap
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, serialization

from rwkv_core import memory
from rwkv_core.errors import InputError
from rwkv_core.files import whole_file
from rwkv_core.formats import container, gguf, huggingface, order, parts, web_rwkv

About = container.About
one_by_one = container.one_by_one

Dtype = Literal["as_loaded", "bf16", "fp16", "fp32"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_LARGE = 1 << 20
"""Bytes of a tensor before which it is worth while to look for memory that is free."""

_PREFIXES = ("_forward_module.", "base_model.model.", "model.")  # DeepSpeed's, Hugging Face PEFT's, Lightning's


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU, in their dtypes, mapped rather than loaded where possible.

    They are in the order of the .pth file, or of the official one where the form keeps none. Prefixes that trainers leave
    before the names are removed. Of a .gguf, packed matrices come in float32, and others in the dtype that they have there.

    Args:
        path: a .pth, .safetensors, web-rwkv's .st, llama.cpp's .gguf, a Hugging Face folder, or a part or the index or the
            folder of one in parts.

    Raises:
        InputError: nothing is there, a part is missing, it is cut short, damaged or no checkpoint, or would run code.
    """
    if path.suffix == gguf.SUFFIX:
        return {name: part.make() for name, part in gguf.lazily(path).items()}
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
    huggingface.restore(tensors, files[0].parent)
    extension = files[0].suffix
    if extension in container.SAFETENSORS and web_rwkv.is_one(tensors, extension):
        tensors = web_rwkv.to_official(tensors, path)
    return tensors if ordered else order.official(tensors)


def special_tokens(path: Path) -> dict[str, int]:
    """Texts that are a token each, as a .gguf or a Hugging Face folder says; the other forms have no place for them.

    Raises:
        InputError: the file can't be read.
    """
    return gguf.special_tokens(path) if path.suffix == gguf.SUFFIX else huggingface.special_tokens(path)


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

    def kind(x: Tensor) -> torch.dtype:
        return x.dtype if dtype == "as_loaded" or not x.is_floating_point() else DTYPES[dtype]

    about = {name: (x.shape, kind(x)) for name, x in tensors.items()}
    write_each(path, about, (x.detach().cpu().to(kind(x)) for _, x in one_by_one(tensors)))


def write_each(path: Path, about: About, tensors: Iterable[Tensor]) -> None:
    """As `write`, of tensors that are made one at a time: none is asked for before the one before it is in the file.

    Args:
        path: the file.
        about: what will be in it.
        tensors: for each name the tensor, on the CPU.

    Raises:
        ValueError: a tensor is of another shape or dtype, or there are more or fewer of them.
        WorldError: there is no room, or no permission.
    """
    with whole_file(path) as temporary:
        write_in_place(temporary, about, tensors)


def write_in_place(path: Path, about: About, tensors: Iterable[Tensor]) -> None:
    """As `write_each`, inside `whole_file`."""
    with (
        path.open("wb") as file,  # a file object, not a name: the name would be part of the bytes
        serialization._open_zipfile_writer(file) as opened,
    ):
        archive = _Archive(opened, about, tensors)
        protocol = serialization.DEFAULT_PROTOCOL
        serialization._save(_stand_ins(about), archive, pickle, protocol, False)  # type: ignore[no-untyped-call]
        if next(archive.tensors, None) is not None:
            raise ValueError("there are more tensors than names")


class _Archive:
    """What torch.save writes into, of tensors that are not there yet.

    torch.save writes names, shapes and dtypes first, then each storage. It is given tensors that stand for the real ones; when
    it comes to the storage of one, that of the real one is written.
    """

    def __init__(self, opened: Any, about: About, tensors: Iterable[Tensor]) -> None:
        """Around a writer of torch."""
        self.opened, self.about, self.tensors = opened, iter(about.items()), iter(tensors)

    def write_record(self, entry: str, content: Any, size: int) -> None:
        """Add an entry to the archive; torch calls this."""
        if isinstance(content, torch.UntypedStorage):
            if size > _LARGE:
                memory.give_back()
            (name, wanted), x = next(self.about), next(self.tensors, None)
            if x is None or (x.shape, x.dtype) != wanted:
                found = "nothing" if x is None else f"{x.dtype} {tuple(x.shape)}"
                raise ValueError(f"{name} is {found}; it must be {wanted[1]} {tuple(wanted[0])}")
            x = x.contiguous()
            begin = x.storage_offset() * x.element_size()
            content = x.untyped_storage()[begin : begin + size]
        self.opened.write_record(entry, content, size)


def _stand_ins(about: About) -> dict[str, Tensor]:
    """Tensors of these shapes and dtypes, each in a storage of its own, on memory that is promised and never touched."""
    largest: dict[torch.dtype, int] = {}
    for shape, dtype in about.values():
        largest[dtype] = max(largest.get(dtype, 1), shape.numel() * dtype.itemsize)
    places = {dtype: mmap.mmap(-1, size) for dtype, size in largest.items()}  # torch refuses two dtypes in one place
    return {
        name: torch.frombuffer(places[dtype], dtype=dtype, count=shape.numel()).view(shape)
        if shape.numel()
        else torch.empty(shape, dtype=dtype)
        for name, (shape, dtype) in about.items()
    }


def convert(tensors: dict[str, Tensor], dtype: torch.dtype | None, device: str = "cpu") -> None:
    """Bring tensors to a dtype (None: leave it) and a device, in place of those given, one at a time.

    What a mapped file had to bring into memory for a tensor is let go, so no second copy of the model is ever there.
    """
    mapped = container.mapped_files()
    for name in list(tensors):
        x = tensors[name]
        tensors[name] = x.to(device=device, dtype=dtype or x.dtype)
        if tensors[name] is not x:
            container.let_go(x, mapped)


def each(path: Path) -> Iterator[tuple[str, Tensor]]:
    """What `read` gives, a tensor at a time: of a file of any form, never more than one of them is in memory.

    Raises:
        InputError: as of `read`.
    """
    if path.suffix != gguf.SUFFIX:
        yield from one_by_one(read(path))
        return
    held = gguf.lazily(path)
    mapped = container.mapped_files()
    for name, part in held.items():
        yield name, part.make()
        for source in part.sources:
            container.let_go(source, mapped)


def check_values(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Refuse what no client could use: values that are no numbers, or that `dtype` can't hold; None is each tensor's own.

    Raises:
        InputError: there is such a value.
    """
    for name, x in one_by_one(tensors):
        if not x.is_floating_point() or not x.numel():
            continue
        kind = dtype or x.dtype
        low, high = (float(value) for value in torch.aminmax(x))  # NaN if there is one
        largest = high if math.isnan(high) or high >= -low else low
        if not math.isfinite(largest):
            raise InputError(
                f"{name} has a value of {largest}", "all must be finite", "this model is broken: train it anew"
            )
        if abs(largest) > torch.finfo(kind).max:
            precision = str(kind).removeprefix("torch.")
            raise InputError(
                f"{name} has a value of {largest:g}",
                f"{precision} ends at {torch.finfo(kind).max:g}",
                "export pth in bf16 or fp32",
            )
