"""A leaderboard of states: each scored on the same held-out documents, with intervals of the differences."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from rwkv_core.data.binidx import Documents
from rwkv_core.errors import InputError
from rwkv_core.evaluation import held_out
from rwkv_core.evaluation.measure import Items, change
from rwkv_core.models.skeleton import RWKV
from rwkv_core.tokenizer import Tokenizer

NONE = "none"
"""The model without a state, after token 0."""


class Standing(NamedTuple):
    """What a state does on documents."""

    name: str
    loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float
    from_none: Mapping[str, float]
    """The change of the loss from that without a state: "value", "low", "high"; below 0 is better."""
    from_best: Mapping[str, float]
    """Likewise, from that of the best of all."""
    better: int
    """1: than none, with the interval; -1: worse; 0: neither can be said."""
    behind: bool
    """Whether the best is better, with the interval."""


def leaderboard(
    model: RWKV,
    documents: Documents,
    tokenizer: Tokenizer,
    states: Mapping[str, Mapping[str, Tensor]],
    *,
    ctx_len: int,
    batch: int,
    resamples: int,
    confidence: float,
    seed: int,
) -> list[Standing]:
    """Score documents after each state, and without; best first. All on the same tokens: not on the first of a document.

    Args:
        model: in evaluation mode.
        documents: what none of the states was trained on.
        tokenizer: of the model's vocabulary.
        states: by name, see `mount`.
        ctx_len: tokens of each document that go through the model at once. It bounds the memory.
        batch: documents side by side.
        resamples: draws of the paired bootstrap, see `measure.change`.
        confidence: coverage of each interval.
        seed: of the draws.

    Raises:
        InputError: a state does not fit, or no document has a token to score.
    """
    scores = {}
    for name, state in {NONE: None, **states}.items():
        scores[name] = held_out.score(
            model, documents, tokenizer, ctx_len=ctx_len, batch=batch, state=state, skip_first=True
        )
    if not scores[NONE].tokens.any():
        raise InputError(f"{len(documents)} documents", "none has a token to score", "give longer ones")
    items = {name: Items(score.nats, score.tokens, higher_is_better=False) for name, score in scores.items()}
    best = min(items, key=lambda name: items[name].mean())
    found = []
    for name, score in scores.items():
        summary = score.summary()
        changes = [
            change(items[other], items[name], resamples=resamples, confidence=confidence, seed=seed)
            for other in (NONE, best)
        ]
        found.append(
            Standing(
                name,
                summary["loss"],
                summary["perplexity"],
                summary["bits_per_byte"],
                changes[0]["change"],
                changes[1]["change"],
                changes[0]["better"],
                changes[1]["better"] < 0,
            )
        )
    return sorted(found, key=lambda standing: standing.loss)
