"""Tuned states as things to work with: read any, mix them, make one of a text, compare them, and see who can mount a file.

Shapes: H heads, N head size, C channels.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_core import checkpoint
from rwkv_core.adapters.file import AdapterRecord, Ingredient, read_record
from rwkv_core.adapters.file import write as write_adapter
from rwkv_core.config import StateConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.formats import tuned_state


class Tuned(NamedTuple):
    """A state in a file."""

    path: Path
    tensors: dict[str, Tensor]
    """See `rwkv_core.formats.tuned_state`."""
    base: str | None
    """Digest of the checkpoint that it belongs to, where the file tells it."""
    vocabulary: str | None
    """Digest of the tokenizer's table, likewise."""
    layers: int

    @property
    def kind(self) -> str:
        """Which parts it has, a key of `tuned_state.PARTS`."""
        return "wkv and token shift" if len(self.tensors) > self.layers else "wkv"

    @property
    def heads(self) -> torch.Size:
        """(H, N, N), of each block."""
        return self.tensors[f"blocks.0.{tuned_state.WKV}"].shape


def read(path: Path) -> Tuned:
    """The state in a file: a .pth of any program, Ai00's .state or .st, or an adapter of ours that is nothing but a state.

    Raises:
        InputError: it can't be read, has no state or more than one, or parts of it are missing or of other shapes.
    """
    record = read_record(path) if path.is_file() else None
    tensors = checkpoint.read(path)
    others = [name for name in tensors if not tuned_state.is_part(name)]
    if others:
        what = "a state alone is taken: what was trained beside one belongs to it"
        remedy = "merge it by `rwkvflow merge`, which writes the state to a file of its own, and take both from there"
        raise InputError(f"{path} has {others[0]}", what, remedy if record is not None else "give a state's file")
    layers = sum(name.endswith(f".{tuned_state.WKV}") for name in tensors)
    kind = "wkv and token shift" if len(tensors) > layers else "wkv"
    names = [f"blocks.{i}.{part}" for i in range(layers) for part in tuned_state.PARTS[kind]]
    wrong = sorted(tensors.keys() ^ set(names))
    if wrong or not names:
        raise InputError(
            f"{path}: {wrong[0]}", "a state has the same parts of each block from 0 on", "give a whole one"
        )
    heads = tensors[names[0]].shape
    if len(heads) != 3 or heads[1] != heads[2]:
        raise InputError(f"{path}: {names[0]} is {tuple(heads)}", "must be heads, N, N", "give a state of RWKV-5 to 7")
    for name, x in tensors.items():
        wanted = heads if name.endswith(f".{tuned_state.WKV}") else torch.Size([heads[0] * heads[1]])
        if x.shape != wanted:
            raise InputError(f"{path}: {name} is {tuple(x.shape)}", f"must be {tuple(wanted)}", "give a whole state")
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{path}: {name}", "has a value that is no number", "train or make it anew")
    ordered = {name: tensors[name] for name in names}
    base, vocabulary = (None, None) if record is None else (record.base_sha256, record.vocabulary_sha256)
    return Tuned(path, ordered, base, vocabulary, layers)


def write(
    out: Path, tensors: Mapping[str, Tensor], base: str | None, vocabulary: str | None, made_of: Sequence[Ingredient]
) -> list[Path]:
    """Save a state, with what it was made of in the file: clients pass that over, `rwkvflow inspect` shows it.

    Args:
        out: the file that clients mount: one tensor a block, whatever else the state has.
        tensors: the state.
        base: digest of the checkpoint that it belongs to.
        vocabulary: digest of the tokenizer's table.
        made_of: files and texts.

    Returns:
        The files: `out`, and if the state has its token shift, `tuned_state.whole(out)`.

    Raises:
        InputError: something is at one of them, or `out` does not end in .pth.
        WorldError: there is no room, or no permission.
    """
    if out.suffix != ".pth":
        raise InputError(str(out), "a state is written as .pth, which all else is made of", "name a .pth")
    files = {out: tuned_state.for_clients(tensors)}
    if len(tensors) > len(files[out]):
        files[tuned_state.whole(out)] = dict(tensors)
    for path in files:
        if path.exists():
            raise InputError(str(path), "something is there already", "name another file, or remove it")
    for path, parts in files.items():
        config = StateConfig(
            kind="state",
            state="wkv" if path == out else "wkv and token shift",
            layers="all",
            also=(),
            load=None,
        )
        record = AdapterRecord(
            format=1, adapter=config, base_sha256=base, data_sha256=None, vocabulary_sha256=vocabulary, run=None,
            made_of=tuple(made_of),
        )  # fmt: skip
        write_adapter(path, {name: x.contiguous().clone() for name, x in parts.items()}, record)
    return list(files)


def mix(states: Sequence[Tuned], weights: Sequence[float]) -> dict[str, Tensor]:
    """The sum of states, each times its weight, in float32; and in the precision that all have, else float32.

    Raises:
        InputError: they are of different models, or some have the token shift and others don't.
    """
    for one, other in itertools.combinations(states, 2):
        agree(one, other)
        if one.kind != other.kind:
            without = one if one.kind == "wkv" else other
            raise InputError(
                f"{without.path} has no token shift, and the other does",
                "half of a token shift is none",
                "give the file without it of each: state.pth, not state.rwkv-flow.pth",
            )
    mixed = {}
    for name in states[0].tensors:
        parts = [state.tensors[name] for state in states]
        total = sum(weight * x.to(torch.float32) for weight, x in zip(weights, parts, strict=True))
        dtypes = {x.dtype for x in parts}
        mixed[name] = torch.as_tensor(total).to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    return mixed


def agree(one: Tuned, other: Tuned) -> None:
    """Refuse states of different models.

    Raises:
        InputError: their shapes say so, or their files.
    """
    about = [f"{state.layers} blocks of {state.heads[0]} heads of {state.heads[1]}" for state in (one, other)]
    if about[0] != about[1]:
        raise InputError(f"{other.path}: {about[1]}", f"{one.path} has {about[0]}", "give states of one model")
    if None not in (one.base, other.base) and one.base != other.base:
        raise InputError(
            f"{other.path} belongs to the base {other.base and other.base[:12]}...",
            f"{one.path} belongs to {one.base and one.base[:12]}...",
            "give states of one model: the same numbers mean something else in another",
        )


def fits(state: Tuned, base_sha256: str, model: Path) -> None:
    """Refuse a state that says it belongs to another checkpoint than this.

    Raises:
        InputError: it does.
    """
    if state.base not in (base_sha256, None):
        raise InputError(
            f"{state.path} belongs to the base {state.base and state.base[:12]}...",
            f"{model} is {base_sha256[:12]}...",
            "give the model that it was made with",
        )


def ingredient(state: Tuned, weight: float) -> Ingredient:
    """A state as a part of another."""
    return Ingredient(kind="state", name=state.path.name, sha256=sha256(state.path), weight=weight)
