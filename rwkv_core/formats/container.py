"""A file of named tensors, .pth or .safetensors, under the names that it has.

A file can hold no code that runs, and its tensors are mapped rather than loaded where possible.
"""

import contextlib
import ctypes
import json
import mmap
import pickle
import re
import struct
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_core import memory
from rwkv_core.errors import InputError, WorldError

SAFETENSORS = (".safetensors", ".st", ".state")
About = Mapping[str, tuple[torch.Size, torch.dtype]]
"""Names with shapes and dtypes, in a file's order."""

SUFFIXES = (*SAFETENSORS, ".pth", ".pt", ".bin")

_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # linux/mman.h; Python has no name for it
_patching = threading.RLock()

PIECE = 1 << 20
"""Values that are converted at once: so many stay in a processor's cache."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Of dtypes, in a .safetensors."""

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip archive's entry: APPNOTE.TXT, 4.3.7
_HAS_DESCRIPTOR = 1 << 3  # a flag: behind the entry's data, its checksum and sizes follow


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU, in the file's order and dtypes.

    Raises:
        InputError: there is no such file, it is cut short, damaged or of another kind, or its pickle asks for code to run.
        WorldError: it is a .safetensors, and the package is missing.
    """
    if not path.is_file():
        raise InputError(str(path), "no checkpoint is there", "correct the path, or download the model to it")
    kind = ".safetensors" if path.suffix in SAFETENSORS else ".pth"
    load: Callable[[Path], Any] = _read_pth
    if kind == ".safetensors":
        try:
            from safetensors.torch import load_file as load
        except ImportError:
            raise WorldError(
                "safetensors", f"the package that reads {path} is missing", "pip install safetensors"
            ) from None
    try:
        with _mapped_unreserved():
            tensors = load(path)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise _unreadable(path, kind, error) from None
        raise InputError(
            f"{path}: its pickle asks for {found[1]}",
            "a checkpoint holds tensors only, and loading one must not run code",
            "do not trust this file; get the model from its publisher",
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise _unreadable(path, kind, error) from None
    if not isinstance(tensors, dict) or not tensors:
        raise InputError(f"{path}: holds a {type(tensors).__name__}", "must be names with tensors", "give an RWKV .pth")
    for name, x in tensors.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise InputError(
                f"{path}: {name!r} is a {type(x).__name__}",
                "every entry must be a tensor under a name",
                "give the model file itself",
            )
        if x.layout != torch.strided or x.is_quantized or _overlaps(x):
            raise InputError(
                f"{path}: {name} is no plain array", "every value must be stored, once", "give the model file itself"
            )
    return tensors


def write_safetensors(path: Path, about: About, tensors: Iterable[Tensor]) -> None:
    """Save tensors as .safetensors, in place: inside `whole_file`. The package's own function needs all of them at once.

    Args:
        path: the file.
        about: what will be in it.
        tensors: for each name the tensor, on the CPU, of any dtype; none is asked for before the one before it is in the file.

    Raises:
        ValueError: a tensor is of another shape, or there are fewer of them.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # the readers of transformers and web-rwkv ask for it
    end = 0
    for name, (shape, dtype) in about.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that values are where their size divides
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, (shape, dtype)), x in zip(about.items(), tensors, strict=True):
            if x.shape != shape:
                raise ValueError(f"{name} is {tuple(x.shape)}; it must be {tuple(shape)}")
            for piece in pieces(x, dtype):
                file.write(piece.numpy().data)
            memory.give_back()


def pieces(x: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The bytes of a tensor in a dtype, some at a time."""
    for piece in torch.split(x.detach().contiguous().view(-1), PIECE):
        yield piece.to(dtype).view(torch.uint8)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one dtype are equal to the bit; of halves, three times as fast as by their values."""
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[x.element_size()]
    return torch.equal(x.view(whole), y.view(whole))


def mapped(path: Path, size: int = 0) -> mmap.mmap:
    """A file's bytes, or the first `size` of them, without memory set aside for what may be written to them."""
    with path.open("rb") as file:
        flags, prot = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(file.fileno(), size, flags=flags, prot=prot)


def one_by_one(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What `read` gave, a tensor at a time; what a mapped file had to bring into memory for one is let go before the next."""
    mapped = mapped_files()
    for name, x in tensors.items():
        yield name, x
        let_go(x, mapped)


def mapped_files() -> list[tuple[int, int]]:
    """Where in memory files are mapped, where Linux says it; else nowhere."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
    regions = [line.split(maxsplit=5) for line in lines]
    return [
        (int(fields[0].split("-")[0], 16), int(fields[0].split("-")[1], 16))
        for fields in regions
        if len(fields) == 6 and fields[5].startswith("/") and not fields[1].endswith("s")  # privately, as torch maps
    ]


def let_go(x: Tensor, mapped: list[tuple[int, int]]) -> None:
    """Give back the pages that only `x` is on. If it is read again, they come from the file again."""
    page = mmap.PAGESIZE
    begin, end = x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
    first, last = -(-begin // page) * page, end // page * page
    if last > first and any(low <= begin and end <= high for low, high in mapped):
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@contextlib.contextmanager
def _mapped_unreserved() -> Iterator[None]:
    """Within, torch maps files without memory set aside for what may be written to them.

    With it, as torch does by itself, the system refuses a file that is larger than its memory, though a model is read from it
    tensor by tensor. What is written to such memory stays there, and never comes to the file.
    """
    own = torch.UntypedStorage.from_file

    def from_file(filename: str, shared: bool = False, nbytes: int = 0) -> Any:
        if shared:
            return own(filename, shared, nbytes)
        return torch.frombuffer(mapped(Path(filename), nbytes), dtype=torch.uint8).untyped_storage()

    with _patching:
        torch.UntypedStorage.from_file = from_file  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.from_file = own  # type: ignore[method-assign]


def _unreadable(path: Path, kind: str, error: Exception) -> InputError:
    size = path.stat().st_size
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return InputError(
        f"{path}: {size} bytes that can't be read ({reason})",
        f"the file is cut short or no {kind}",
        "download it again",
    )


def _read_pth(path: Path) -> Any:
    """What a .pth file holds, which need not be tensors."""
    archive = zipfile.is_zipfile(path)
    if archive:
        _check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def _check_archive(path: Path) -> None:
    """Refuse a damaged archive. torch compares no checksum, and maps a tensor from wherever its entry seems to begin.

    The values of tensors are not read here.

    Raises:
        ValueError: an entry is damaged, packed, or not where the archive says.
        zipfile.BadZipFile: likewise.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if re.search(r"(^|/)data/[^/]+$", entry.filename) is None:
                archive.read(entry)  # also compares its checksum
                continue
            file.seek(entry.header_offset)
            *_, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            name = file.read(name_length).decode("utf-8")
            file.seek(extra_length + entry.file_size, 1)
            behind = b"PK\x07\x08" if entry.flag_bits & _HAS_DESCRIPTOR else b"PK"
            packed = entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
            if packed or name != entry.filename or not file.read(4).startswith(behind):
                raise ValueError(f"{entry.filename} is damaged")


def _overlaps(x: Tensor) -> bool:
    """Whether two elements share their memory. What a file stores never does; damaged strides can."""
    span = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= span:
            return x.numel() > 0
        span += stride * (size - 1)
    return False
