"""Reads a .pth as its clients do, without torch: names in order, and how each tensor lies in the file.

A .pth is a zip archive: a pickle that says which tensors there are, and an entry for each storage. Clients map it.
Source: torch/serialization.py; what is asked of it: the rwkv package's model.py and RWKV Runner's backend-python.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_core.conformance import layout
from rwkv_core.conformance.contents import Array, Contents, Stored, Unreadable

_DTYPES = {"FloatStorage": ("F32", "<f4"), "HalfStorage": ("F16", "<f2"), "BFloat16Storage": ("BF16", "<u2")}
_LOCAL_HEADER = 30  # bytes before an entry's name: APPNOTE.TXT, 4.3.7
PREFIXES = ("_orig_mod.", "module.", "_forward_module.")
"""Left by trainers before the names; no client knows them."""


class _Storage(NamedTuple):
    kind: str
    numpy: str
    key: str
    elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Kind:
    """Stands for a class that is named in the pickle, such as torch.FloatStorage."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Pickle(pickle.Unpickler):
    """Knows what a checkpoint has in it, and nothing else: no code of the file is run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Tensor(storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _Kind(name)
        raise Unreadable(f"its pickle asks for {module}.{name}; torch.load with weights_only refuses it")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, elements = pid
        if not isinstance(kind, _Kind) or kind.name not in _DTYPES:
            raise Unreadable(f"a tensor is of {getattr(kind, 'name', kind)}: no client computes with it")
        return _Storage(*_DTYPES[kind.name], str(key), int(elements))


def tensors(path: Path) -> tuple[dict[str, Stored], list[tuple[str, str, str]]]:
    """The tensors of a .pth by the names in it, and what is wrong with how they lie.

    Raises:
        Unreadable: it is no zip archive, is cut short, or holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            (listing,) = (name for name in entries if name.endswith("/data.pkl"))
            held = _Pickle(io.BytesIO(archive.read(listing))).load()
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"it can't be read as a .pth of this decade ({error})") from None
    if not isinstance(held, dict) or not held:
        raise Unreadable(f"it holds a {type(held).__name__}, not names with tensors")
    found, wrong, seen = dict[str, Stored](), list[tuple[str, str, str]](), dict[str, str]()
    mapped = np.memmap(path, np.uint8, "r")
    for name, x in held.items():
        if not isinstance(name, str) or not isinstance(x, _Tensor):
            raise Unreadable(f"{name!r} is a {type(x).__name__}, not a tensor")
        entry = entries.get(listing.removesuffix("data.pkl") + f"data/{x.storage.key}")
        whole = _bytes(mapped, entry, x.storage) if entry is not None else None
        if whole is None:
            raise Unreadable(f"the values of {name} are not all in the file")
        usual, step = list[int](), 1
        for size in reversed(x.size):
            usual.insert(0, step)
            step *= size
        if any(size > 1 and got != want for size, got, want in zip(x.size, x.stride, usual, strict=True)):
            wrong.append(("contiguous", f"{name} has strides {x.stride}", "each tensor lies in one piece, row by row"))
        if x.storage.key in seen:
            wrong.append(
                (
                    "storage of its own",
                    f"{name} shares that of {seen[x.storage.key]}",
                    "no tensor is a view of another's",
                )
            )
        elif x.storage.elements != step:
            extra = x.storage.elements - step
            wrong.append(
                ("storage of its own", f"{name} brings {extra} values that no tensor has", "nothing but the tensors")
            )
        seen[x.storage.key] = name
        item = whole.itemsize
        if x.offset + sum((n - 1) * s for n, s in zip(x.size, x.stride, strict=True)) >= max(len(whole), 1):
            raise Unreadable(f"{name} reaches beyond its storage")
        raw = np.lib.stride_tricks.as_strided(whole[x.offset :], x.size, [s * item for s in x.stride], writeable=False)
        found[name] = Stored(raw, x.storage.kind)
    return found, wrong


def _bytes(mapped: Array, entry: zipfile.ZipInfo, storage: _Storage) -> Array | None:
    """The values of a storage; None if they are not there."""
    header = mapped[entry.header_offset : entry.header_offset + _LOCAL_HEADER]
    if entry.compress_type != zipfile.ZIP_STORED or len(header) < _LOCAL_HEADER:
        return None
    name, extra = (int(n) for n in np.frombuffer(header[26:30].tobytes(), "<u2"))
    begin = entry.header_offset + _LOCAL_HEADER + name + extra
    size = storage.elements * np.dtype(storage.numpy).itemsize
    if size > entry.file_size or begin + size > len(mapped):
        return None
    return mapped[begin : begin + size].view(storage.numpy)


def read(path: Path) -> Contents:
    """A model as the rwkv package and RWKV Runner find it: all names official.

    Raises:
        Unreadable: they would not load it.
    """
    found, wrong = tensors(path)
    version, n_layer = layout.version(found), layout.layers(found)
    if "emb.weight" not in found or not n_layer:
        given = next((p for p in PREFIXES if any(name.startswith(p) for name in found)), None)
        told = f"its names begin with {given}" if given else f"it has no emb.weight, but {next(iter(found))}"
        raise Unreadable(f"{told}: clients look for the official names")
    gated, logarithm = "blocks.0.att.gate.weight" in found, "blocks.0.att.time_first" in found
    wanted = layout.names(version, n_layer, gated=gated, logarithm=logarithm)
    own = (
        "blocks.0.att.r_k"
        if version == "7"
        else "blocks.0.att.time_decay"
        if version == "5"
        else "blocks.0.att.time_faaaa"
    )
    heads = found[own].shape[0] if version != "4" and own in found else 1
    order = [name.rsplit("_", 1)[1] for name in found if name.startswith("blocks.0.att.x_")]
    if version == "7" and order and order != list(layout.LERPS):
        wrong.append(
            ("order of x_r to x_g", " ".join(order), f"{' '.join(layout.LERPS)}: converters join them as they come")
        )
    return Contents(
        version,
        n_layer,
        found,
        heads,
        unexpected=tuple(name for name in found if name not in wanted),
        missing=tuple(name for name in wanted if name not in found and name not in layout.UNUSED),
        findings=tuple(wrong),
    )


def read_state(path: Path) -> Contents:
    """A tuned state as RWKV Runner finds it: (H, N, N) a block, rows are values.

    Raises:
        Unreadable: it is none.
    """
    found, wrong = tensors(path)
    return state(found, wrong)


def state(found: dict[str, Stored], wrong: list[tuple[str, str, str]]) -> Contents:
    """What a state file has."""
    n_layer = layout.layers(found)
    wanted = [f"blocks.{i}.att.time_state" for i in range(n_layer)]
    return Contents(
        "state",
        n_layer,
        found,
        heads=next((x.shape[0] for x in found.values() if len(x.shape) == 3), 0),
        unexpected=tuple(name for name in found if name not in wanted),
        missing=tuple(name for name in wanted if name not in found),
        findings=tuple(wrong),
    )
