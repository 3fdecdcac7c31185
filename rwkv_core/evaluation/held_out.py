"""Is the tuned model better than its base? Both score the same held-out documents, and the difference gets an interval."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.head_loss import IGNORE, token_nll
from rwkv_core import memory
from rwkv_core.data.binidx import Documents
from rwkv_core.errors import InputError
from rwkv_core.evaluation.measure import FEWEST, Array
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import mount
from rwkv_core.tokenizer import END, Tokenizer


class Scores(NamedTuple):
    """What a model makes of each document, in the documents' order. (D,) each.

    Of a document with a mask these are its learned tokens: what a question or a prompt is made of is not the model's to say.
    """

    nats: Array
    """Sum of the cross-entropies of its tokens, the end token included."""
    tokens: Array
    """How many these are; 0 where none is learned."""
    bytes: Array
    """Of their text."""

    def loss(self) -> float:
        """Mean cross-entropy in nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    def summary(self) -> dict[str, float]:
        """Loss, perplexity, and bits per byte (Gao et al. 2020, "The Pile", section 3.1, arXiv:2101.00027)."""
        loss = self.loss()
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # beyond it a float has no exponential
            "bits_per_byte": float(self.nats.sum() / (math.log(2) * self.bytes.sum())),
        }


@memory.reused()
@torch.no_grad()
def score(
    model: RWKV,
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    ctx_len: int,
    batch: int,
    state: Mapping[str, Tensor] | None = None,
    skip_first: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score every document whole, whatever its length: the state goes from slice to slice of `ctx_len` tokens.

    Documents of like length share a batch; the scores do not depend on that. A document is read after token 0, from which its
    first token is predicted; or after a tuned state, and it is not. Two models are compared on the tokens that both predict.
    All tokens are read, and those that the documents' mask has are scored.

    Args:
        model: in evaluation mode.
        documents: what to score.
        tokenizer: to count the bytes by.
        ctx_len: tokens of each document that go through the model at once. It bounds the memory.
        batch: documents side by side.
        state: tuned, see `mount`; each document begins from it, without a token 0.
        skip_first: leave the first token of each document out of the score; after a state it always is.
        progress: is told how many documents are done, and how many there are.
    """
    device, skipped = model.emb.weight.device, int(skip_first or state is not None)
    order = np.argsort(documents.sizes, kind="stable")[::-1]  # the largest first: too little memory shows at once
    nats, count, size = (np.zeros(len(documents)) for _ in range(3))
    lengths = np.array([len(entry) for entry in tokenizer.table])
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = int(documents.sizes[chosen[0]])
        tokens = torch.full((len(chosen), longest + 1), IGNORE, dtype=torch.int64)
        tokens[:, 0] = END
        goals = tokens.clone()
        for row, i in enumerate(chosen.tolist()):
            document, scored = documents[i].astype(np.int64), documents.learned(i).copy()
            scored[:skipped] = False
            here = slice(1, 1 + len(document))
            tokens[row, here] = torch.from_numpy(document)
            goals[row, here] = torch.from_numpy(np.where(scored, document, IGNORE))
            count[i], size[i] = np.count_nonzero(scored), lengths[document[scored]].sum()
        tokens, goals = tokens.to(device), goals.to(device)
        carried = None if state is None else mount(model.initial_state(len(chosen)), state)
        for at in range(0 if state is None else 1, longest, ctx_len):
            targets = goals[:, at + 1 : at + 1 + ctx_len]
            inputs = tokens[:, at : at + targets.shape[1]].clamp(min=END)
            features, carried = model.features(inputs, carried)
            nll = token_nll(features.flatten(0, 1), model.head.weight, targets.flatten())
            nats[chosen] += nll.view(targets.shape).double().sum(1).cpu().numpy()
        if progress is not None:
            progress(start + len(chosen), len(order))
    return Scores(nats, count, size)


def compare(base: Scores, tuned: Scores, *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
    """Both summaries, and what tuning changed with a paired bootstrap interval over documents.

    Documents, not tokens, are drawn, with replacement: tokens of one document are not independent. Each draw scores both
    models on the same documents, so the documents' own difficulty cancels.

    Args:
        base: scores of the base.
        tuned: of the tuned model, on the same documents.
        resamples: draws.
        confidence: coverage of the interval.
        seed: of the draws.

    Returns:
        {"base": summary, "tuned": summary, "change": {metric: {"value", "low", "high"}}, "better", "documents", "tokens",
        "documents_not_scored"}. The last have no token that is learned, and are left out of everything else. A change is tuned
        minus base: below 0 is better. "better" is 1 if the loss's interval lies below 0, -1 if above, else 0; and 0 where there
        are fewer than FEWEST documents, whose draws tell little of what others would give.

    Raises:
        InputError: no document has a token that is learned.

    Source:
        Percentile intervals: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; paired over test items,
        as in Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation".
    """
    scored = base.tokens > 0
    if not scored.any():
        raise InputError(
            f"{len(scored)} held-out documents",
            "none has a token that is learned, so there is nothing to score",
            "look at the mask of data.parts, or hold out more: data.holdout.fraction",
        )
    base, tuned = (Scores(*(column[scored] for column in scores)) for scores in (base, tuned))
    before, after = base.summary(), tuned.summary()
    count = len(base.nats)
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in before}
    for _ in range(resamples):
        chosen = rng.integers(0, count, count)
        one, other = (Scores(*(column[chosen] for column in scores)).summary() for scores in (base, tuned))
        for name, values in draws.items():
            values.append(other[name] - one[name])
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    change = {}
    for name, values in draws.items():
        low, high = np.quantile(values, tails)
        change[name] = {"value": after[name] - before[name], "low": float(low), "high": float(high)}
    loss = change["loss"]
    return {
        "base": before,
        "tuned": after,
        "change": change,
        "better": (loss["high"] < 0) - (loss["low"] > 0) if count >= FEWEST else 0,
        "documents": count,
        "documents_not_scored": int((~scored).sum()),
        "tokens": int(base.tokens.sum()),
        "confidence": confidence,
    }


def held_out_prompts(
    documents: Documents, tokenizer: Tokenizer, count: int, marker: str = "\n\nAssistant:"
) -> Sequence[str]:
    """Beginnings of held-out documents up to the first answer, evenly spread over those that have one."""
    texts = (tokenizer.decode(documents[i][:-1].tolist()) for i in range(len(documents)))
    found = [text[: text.index(marker) + len(marker)] for text in texts if marker in text]
    return [found[i * len(found) // count] for i in range(count)] if len(found) >= count else found
