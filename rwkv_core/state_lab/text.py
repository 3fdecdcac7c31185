"""A state from a text: what a model is after reading it, as a file that stands for the text."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_core.adapters.file import Ingredient
from rwkv_core.data.dialogue import ROLES
from rwkv_core.errors import InputError
from rwkv_core.formats import tuned_state
from rwkv_core.generation.text import read
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import State, mount, unmount
from rwkv_core.tokenizer import END, Tokenizer

_SLICE = 512
"""Tokens of a text that the model reads at once. It bounds the memory."""

_SHOWN = 40
"""Characters of a text that a record has."""


class Read(NamedTuple):
    """A text that was read."""

    state: State
    """Whole, of one row."""
    logits: Tensor
    """(1, V): what may come next."""
    tokens: int
    """Of the text."""


def of_text(text: str) -> Ingredient:
    """A text that was read, as a part of a state."""
    shown = " ".join(text.split())
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return Ingredient(kind="text", name=shown, sha256=hashlib.sha256(text.encode()).hexdigest(), weight=1.0)


def as_read(text: str) -> str:
    """What is read of a text: a conversation up to the blank line where its next turn would begin; else the text as it is."""
    role, colon, _ = text.lstrip().partition(":")
    return f"{text.strip()}\n\n" if colon and role in ROLES else text


def from_text(model: RWKV, tokenizer: Tokenizer, text: str, begin: State | None = None) -> Read:
    """The state after a text: a model that begins from it goes on as if it had read the text.

    Args:
        model: RWKV-5, 6 or 7, in evaluation mode.
        tokenizer: of its vocabulary.
        text: what to read.
        begin: a state of one row that it is read after; None: it is a document, and read after token 0.

    Raises:
        InputError: the model is an RWKV-4, or the text is empty.
    """
    if model.config.version == "4":
        raise InputError(
            "a state of an RWKV-4",
            "has three numbers a channel and no matrix, which no client mounts",
            "take RWKV-5 to 7",
        )
    ids = tokenizer.encode(text)
    if not ids:
        raise InputError("the text is empty", "a state is made of what was read", "give some")
    logits, state = read(model, [*([END] if begin is None else []), *ids], begin, _SLICE)
    return Read(state, logits, len(ids))


class Loss(NamedTuple):
    """What a client loses that mounts the WKV state alone."""

    first: float
    """Kullback-Leibler divergence in nats of the first prediction, from that after the whole state."""
    mean: float
    """Of all of them."""
    same: float
    """Share of predictions whose likeliest token is the same."""
    tokens: int


@torch.no_grad()
def without_shift(model: RWKV, known: Read, count: int = 32) -> Loss:
    """Compare what comes after a text with what comes after its WKV state alone: the token shift of its last token is missing.

    Args:
        model: in evaluation mode.
        known: the text.
        count: tokens that are read after it in both cases: the likeliest, one after the other.
    """
    state = known.state
    bare = mount(model.initial_state(1), tuned_state.for_clients(unmount(state)))
    token, losses, same = known.logits.argmax(-1, keepdim=True), [], 0
    for _ in range(count):
        whole, state = model(token, state)
        part, bare = model(token, bare)
        p, q = (torch.log_softmax(logits[0, -1].double(), -1) for logits in (whole, part))
        losses.append(float((p.exp() * (p - q)).sum()))
        same += int(p.argmax() == q.argmax())
        token = whole[:, -1].argmax(-1, keepdim=True)
    return Loss(losses[0], sum(losses) / count, same / count, count)
