"""A model to talk with: a checkpoint with what is mounted on it, its tokenizer, and where it begins."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach, file
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.adapters.state import give
from rwkv_core.checkpoint import DTYPES, Dtype
from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import sha256
from rwkv_core.merge import merged
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import State, mount
from rwkv_core.quantize import Form
from rwkv_core.tokenizer import Tokenizer, for_vocabulary


class Opened(NamedTuple):
    """What `open_model` gives."""

    model: RWKV
    """In evaluation mode."""
    tokenizer: Tokenizer
    begin: State | None
    """A tuned state, of one row, that every text begins from; None: from token 0, as a document in training."""


def open_model(
    path: Path,
    *,
    adapter: Path | None = None,
    state: Path | None = None,
    tokenizer: Path | None = None,
    special: Mapping[str, int] | None = None,
    dtype: Dtype = "as_loaded",
    device: Literal["cpu", "cuda"] | None = None,
    head_size_divisor: float | None = None,
    quantize: Form = "none",
) -> Opened:
    """The model in a checkpoint, and what is mounted on it.

    Args:
        path: the model.
        adapter: trained on it, of RWKV-Flow. If it has a tuned state, texts begin from that.
        state: a file of a state tuned on it; texts begin from it.
        tokenizer: a `tokenizers` file, where the vocabulary is none of ours.
        special: texts that are a token each, as in the training's `data.special_tokens`; none are those that the file says.
        dtype: what to compute in.
        device: where to compute; None is cuda where there is one.
        head_size_divisor: as of `models.load`.
        quantize: how to keep the matrices of the blocks. An adapter then stays beside them, as in training, and costs its part
            of each token; without, it is merged into them as they are loaded.

    Raises:
        InputError: a file can't be read, or does not fit the model; or two states are given.
        WorldError: the device or a package is missing.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise WorldError("device cuda", "torch finds no CUDA device here", "take cpu")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = models.load(
        path, dtype=DTYPES.get(dtype), device=where, head_size_divisor=head_size_divisor, quantize=quantize
    )
    words = for_vocabulary(model.config.vocab_size, tokenizer).with_special(special or checkpoint.special_tokens(path))
    record = None if adapter is None else _put_in(model, path, adapter, quantize)
    tuned = record is not None and record.adapter.state != "none"
    if tuned and state is not None:
        raise InputError(f"--state {state}", f"{adapter} has a state of its own", "give one of them")
    begin = model.initial_state(1) if tuned else None
    if state is not None:
        begin = mount(model.initial_state(1), checkpoint.read(state))
    return Opened(model.eval().requires_grad_(False), words, begin)


@torch.no_grad()
def _put_in(model: RWKV, base: Path, adapter: Path, quantize: Form) -> AdapterRecord:
    """Merge the adapter into the loaded model: tokens then cost no more than the base's; beside packed matrices, attach it."""
    parts, record = file.read_for(base, sha256(base), adapter, "give that one")
    if quantize != "none":
        attach(model, record.adapter, 0, originals=checkpoint.read(base), start=parts)
        return record
    give(model, record.adapter.state)
    tensors = model.state_dict()
    adapted, replaced = merged(tensors, parts, record.adapter, adapter, record.quantize)
    for name, make in (adapted | replaced).items():
        tensors[name].copy_(make())
    return record
