"""What a model makes of documents: the loss of each, whole and by the position in it; and what another model changes of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.head_loss import IGNORE, token_nll
from rwkv_core import memory
from rwkv_core.data.binidx import Documents
from rwkv_core.data.whole import Source
from rwkv_core.errors import InputError
from rwkv_core.evaluation.measure import Array, Items, change
from rwkv_core.evaluation.store import Journal
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import mount
from rwkv_core.tokenizer import END, Tokenizer

BEGINNING = 16
"""Tokens of a document that are its first range of positions; each further range ends at twice the one before."""

_BATCH = 32
"""What a batch costs beside its tokens, in tokens: to read the model's matrices, to start its kernels."""


class Scores(NamedTuple):
    """What a model makes of each document, in the documents' order. (D,) each, or (D, P) over ranges of positions.

    Of a document with a mask these are its learned tokens: what a question or a prompt is made of is not the model's to say.
    """

    nats: Array
    """Sum of the cross-entropies of its tokens, the end token included."""
    tokens: Array
    """How many these are; 0 where none is learned."""
    bytes: Array
    """Of their text."""
    nats_by_position: Array
    """(D, P): the nats of its tokens up to BEGINNING, of those from there to twice that, and so on; see `ends`."""
    tokens_by_position: Array
    """(D, P)."""

    def of(self, chosen: npt.NDArray[np.bool_]) -> "Scores":
        """Those of some documents, (D,)."""
        return Scores(*(column[chosen] for column in self))

    def without(self, left_out: npt.NDArray[np.bool_]) -> "Scores":
        """As many documents, of which those (D,) count for nothing."""
        return Scores(*(np.where(left_out.reshape(-1, *[1] * (c.ndim - 1)), 0.0, c) for c in self))

    def loss(self) -> float:
        """Mean cross-entropy in nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    def summary(self) -> dict[str, float]:
        """Loss, perplexity, and bits per byte (Gao et al. 2020, "The Pile", section 3.1, arXiv:2101.00027)."""
        return {name: float(form(items.mean())) for name, (items, form) in self._metrics().items()}

    def items(self) -> Items:
        """The loss as a measure."""
        return Items(self.nats, self.tokens, higher_is_better=False)

    def _metrics(self) -> dict[str, tuple[Items, Callable[[Any], Any]]]:
        """What a summary has: the mean of which items, and what is made of it."""
        bits = Items(self.nats / math.log(2), self.bytes, higher_is_better=False)
        return {
            "loss": (self.items(), _as_it_is),
            "perplexity": (self.items(), _perplexity),
            "bits_per_byte": (bits, _as_it_is),
        }


def _as_it_is(mean: Any) -> Any:
    return mean


def _perplexity(loss: Any) -> Any:
    return np.exp(np.minimum(loss, 700.0))  # beyond it a float has no exponential


def ends(longest: int) -> list[int]:
    """Where the ranges of positions in a document of so many tokens end: 16, 32, 64, ..., the last at `longest` or beyond."""
    return [BEGINNING << i for i in range(max(math.ceil(math.log2(max(longest, 1) / BEGINNING)), 0) + 1)]


@memory.reused()
@torch.no_grad()
def score(
    model: RWKV | Callable[[], RWKV],
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    ctx_len: int,
    batch: int,
    state: Mapping[str, Tensor] | None = None,
    skip_first: bool = False,
    progress: Callable[[int, int], None] | None = None,
    journal: Journal | None = None,
) -> Scores:
    """Score every document whole, whatever its length: the state goes from slice to slice of `ctx_len` tokens.

    Documents of like length share a batch, see `together`; the scores do not depend on that. A document is read after token 0,
    from which its first token is predicted; or after a tuned state, and it is not. Two models are compared on the tokens that
    both predict. All tokens are read, and those that the documents' mask has are scored.

    Args:
        model: in evaluation mode; or what gives it, which is asked only if there is something left to score.
        documents: what to score.
        tokenizer: to count the bytes by.
        ctx_len: tokens of each document that go through the model at once. It bounds the memory.
        batch: documents side by side, at most.
        state: tuned, see `mount`; each document begins from it, without a token 0.
        skip_first: leave the first token of each document out of the score; after a state it always is.
        progress: is told how many documents are done, and how many there are.
        journal: has the batches that were scored before, and gets the others.
    """
    journal, loaded = journal or Journal(), model if isinstance(model, RWKV) else None
    order = np.argsort(documents.sizes, kind="stable")[::-1]  # the largest first: too little memory shows at once
    ranges = len(ends(int(documents.sizes.max(initial=0))))
    nats, tokens, size = np.zeros((len(order), ranges)), np.zeros((len(order), ranges)), np.zeros(len(order))
    widths = np.array([len(entry) for entry in tokenizer.table])
    for number, (start, stop) in enumerate(pairwise(together(documents.sizes[order], batch))):
        chosen = order[start:stop]
        if number == len(journal.pieces):
            loaded = loaded or model()
            found = _batch(loaded, documents, chosen, widths, ctx_len, state, int(skip_first or state is not None))
            journal.add([column.tolist() for column in found])
            if progress is not None:
                progress(stop, len(order))
        some_nats, some_tokens, size[chosen] = journal.pieces[number]
        here = len(some_nats[0])
        nats[chosen, :here], tokens[chosen, :here] = some_nats, some_tokens
    return Scores(nats.sum(1), tokens.sum(1), size, nats, tokens)


def together(sizes: npt.NDArray[np.integer[Any]], most: int) -> list[int]:
    """Which documents share a batch, so that all of them take the least: each is filled up to the longest of its batch.

    Args:
        sizes: (D,), their tokens, the longest first.
        most: documents of a batch, at least 1.

    Returns:
        Where batches begin, and D.
    """
    count = len(sizes)
    cost, stops = np.zeros(count + 1), np.zeros(count, np.int64)
    rows = np.arange(1, most + 1)
    for i in range(count - 1, -1, -1):  # what is from i on, by what is from each later place on
        several = int(sizes[i]) * rows[: count - i] + cost[i + 1 : i + 1 + most]
        best = int(several.argmin())
        cost[i], stops[i] = several[best] + _BATCH, i + 1 + best
    found = [0]
    while found[-1] < count:
        found.append(int(stops[found[-1]]))
    return found


def _batch(
    model: RWKV,
    documents: Documents,
    chosen: npt.NDArray[np.integer[Any]],
    widths: npt.NDArray[np.integer[Any]],
    ctx_len: int,
    state: Mapping[str, Tensor] | None,
    skipped: int,
) -> tuple[Array, npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]]:
    """Score the documents `chosen`, (R,), the longest first: nats and tokens by position, (R, P), and bytes, (R,)."""
    device, longest = model.emb.weight.device, int(documents.sizes[chosen[0]])
    tokens = torch.full((len(chosen), longest + 1), IGNORE, dtype=torch.int64)
    tokens[:, 0] = END
    goals, size = tokens.clone(), np.zeros(len(chosen), np.int64)
    for row, i in enumerate(chosen.tolist()):
        document, scored = documents[i].astype(np.int64), documents.learned(i).copy()
        scored[:skipped] = False
        here = slice(1, 1 + len(document))
        tokens[row, here] = torch.from_numpy(document)
        goals[row, here] = torch.from_numpy(np.where(scored, document, IGNORE))
        size[row] = widths[document[scored]].sum()
    begins = np.array([0, *ends(longest)[:-1]])
    count = np.add.reduceat((goals[:, 1:] != IGNORE).numpy(), begins, 1, np.int64)
    nats = np.zeros(count.shape)
    tokens, goals = tokens.to(device), goals.to(device)
    carried = None if state is None else mount(model.initial_state(len(chosen)), state)
    head = model.head.now()
    for at in range(0 if state is None else 1, longest, ctx_len):
        targets = goals[:, at + 1 : at + 1 + ctx_len]
        inputs = tokens[:, at : at + targets.shape[1]].clamp(min=END)
        features, carried = model.features(inputs, carried)
        nll = token_nll(features.flatten(0, 1), head, targets.flatten())
        first, last = np.searchsorted(begins, [at, at + targets.shape[1] - 1], "right") - 1
        cuts = np.maximum(begins[first : last + 1] - at, 0)
        nats[:, first : last + 1] += np.add.reduceat(nll.view(targets.shape).double().cpu().numpy(), cuts, 1)
    return nats, count, size


def compare(base: Scores, tuned: Scores, *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
    """Both summaries, and what tuning changed, see `measure.change`.

    Args:
        base: scores of the base.
        tuned: of the tuned model, on the same documents.
        resamples: draws.
        confidence: coverage of the interval.
        seed: of the draws.

    Returns:
        {"base": summary, "tuned": summary, "change": {metric: {"value", "low", "high"}}, "better", "documents", "tokens",
        "documents_not_scored"}. The last have no token that is learned, and are left out of everything else. A change is tuned
        minus base: below 0 is better. "better" is that of the loss.

    Raises:
        InputError: no document has a token that is learned.
    """
    scored = base.tokens > 0
    if not scored.any():
        raise InputError(
            f"{len(scored)} held-out documents",
            "none has a token that is learned, so there is nothing to score",
            "look at the mask of data.parts, or hold out more: data.holdout.fraction",
        )
    base, tuned = base.of(scored), tuned.of(scored)
    after = tuned._metrics()
    found = {
        name: change(items, after[name][0], resamples=resamples, confidence=confidence, seed=seed, form=form)
        for name, (items, form) in base._metrics().items()
    }
    return {
        "base": base.summary(),
        "tuned": tuned.summary(),
        "change": {name: one["change"] for name, one in found.items()},
        "better": found["loss"]["better"],
        "documents": len(base.nats),
        "documents_not_scored": int((~scored).sum()),
        "tokens": int(base.tokens.sum()),
        "confidence": confidence,
    }


def by_source(scores: Scores, sources: Sequence[Source]) -> dict[str, Items]:
    """The loss of each source's documents."""
    numbers = np.arange(len(scores.nats))
    return {
        name: scores.of((numbers >= first) & (numbers < first + documents)).items()
        for name, first, documents in sources
        if documents
    }


def by_position(base: Scores, tuned: Scores, *, resamples: int, confidence: float, seed: int) -> list[dict[str, float]]:
    """How the loss changes with what stands before a token: a row for each range of positions that has scored tokens.

    Returns:
        {"from", "to", "tokens", "base_loss", "tuned_loss", "change", "low", "high"} each; positions count from 1, both ends
        among them. The interval is that of `measure.change`.
    """
    rows, begin = [], 1
    for i in range(base.nats_by_position.shape[1]):
        end = BEGINNING << i
        one, other = (Items(s.nats_by_position[:, i], s.tokens_by_position[:, i], False) for s in (base, tuned))
        tokens = int(one.weight.sum())
        if tokens:
            found = change(one, other, resamples=resamples, confidence=confidence, seed=seed)
            value, low, high = found["change"].values()
            row = {"from": begin, "to": end, "tokens": tokens, "base_loss": found["base"], "tuned_loss": found["tuned"]}
            rows.append({**row, "change": value, "low": low, "high": high})
        begin = end + 1
    return rows


def held_out_prompts(
    documents: Documents, tokenizer: Tokenizer, count: int, marker: str = "\n\nAssistant:"
) -> Sequence[str]:
    """Beginnings of held-out documents up to the first answer, evenly spread over those that have one."""
    texts = (tokenizer.decode(documents[i][:-1].tolist()) for i in range(len(documents)))
    found = [text[: text.index(marker) + len(marker)] for text in texts if marker in text]
    return [found[i * len(found) // count] for i in range(count)] if len(found) >= count else found
