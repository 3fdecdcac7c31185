"""How a model reads what it is asked, and how likely it finds what follows.

What several continuations have in common is read once: the choices of a question after one reading of the question, and the
questions after one reading of the examples that stand before them all. The state is what makes it possible.
Shapes: B batch, R positions, V vocabulary, P pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.head_loss import IGNORE
from rwkv_core import memory
from rwkv_core.evaluation.measure import Array
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import Continuation, generate, read, read_together
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import State, select
from rwkv_core.tokenizer import END, Tokenizer

_T = TypeVar("_T")

_PREAMBLE = 64
"""Tokens from which on a beginning that several contexts share is read by itself: shorter ones would cost the batches more."""

_ROWS = 256
"""Positions whose logits stand in memory at a time: 64 MB of float32 at V = 65536."""


@dataclass(frozen=True)
class Reader:
    """A model, and how it reads.

    Every text is read after token 0, as documents are in training and as BlinkDL's own evaluations do; or after a tuned state,
    and then without token 0, as the state was tuned. A state predicts nothing by itself, so after one the first token of a text
    that has nothing before it is not scored.
    """

    model: RWKV
    """In evaluation mode."""
    tokenizer: Tokenizer
    """Of its vocabulary."""
    ctx_len: int
    """Tokens of each text that go through the model at once. With `batch` it bounds the memory; no score depends on it."""
    batch: int
    """Texts side by side."""
    begin: State | None = None
    """A tuned state of one row, see `models.state.mount`."""
    skip_first: bool = False
    """Leave that first token out without a state too: so two models are compared on the tokens that both predict."""

    def pair(self, context: str, continuation: str) -> "Pair":
        """The tokens of a continuation, and of what is before it; see `encode_pair`."""
        return encode_pair(self.tokenizer, context, continuation)

    def answers(self, prompts: Sequence[str], *, max_tokens: int, stop: tuple[str, ...] = ()) -> list[Continuation]:
        """The greedy continuation of each prompt, in their order; those of like length are read together.

        Args:
            prompts: texts; after a state none may be empty.
            max_tokens: longest continuation.
            stop: texts at which one ends; they are not part of it.

        Raises:
            InputError: a prompt after a state is empty.
            WorldError: the model's logits are not finite.
        """
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, top_p=1.0, seed=0, stop=stop)
        return self.generate(prompts, sampling)

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Continuation]:
        """As `answers`, with any sampling: what is drawn depends on the seed, and on the prompt's place by length."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        states = None if self.begin is None else [self.begin] * len(prompts)
        found = generate(
            self.model,
            self.tokenizer,
            [prompts[i] for i in order],
            sampling,
            ctx_len=self.ctx_len,
            batch=self.batch,
            states=states,
        )
        back = dict(zip(order, found, strict=True))
        return [back[i] for i in range(len(prompts))]

    def placed(self, pair: "Pair") -> "Pair":
        """What is read before the first token that is scored, and the tokens that are."""
        context, goals = pair
        if not context and (self.begin is not None or self.skip_first):
            context, goals = goals[:1], goals[1:]
        return Pair(context if self.begin is not None else (END, *context), goals)


class Pair(NamedTuple):
    """Tokens that are read, and tokens that are scored after them."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihoods(NamedTuple):
    """What a model makes of each continuation. (P,) each."""

    nats: Array
    """Sum of the cross-entropies of its tokens: minus the logarithm of its probability."""
    tokens: npt.NDArray[np.int64]
    """How many these are."""
    greedy: npt.NDArray[np.bool_]
    """Whether each of them is the likeliest, so that greedy decoding would write the continuation."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The tokens of a continuation, and of what is before it, as lm-eval's models encode them.

    Both are encoded as one text, for encode(a) + encode(b) is not encode(a + b); blanks at the context's end belong to the
    continuation. What is scored are the tokens from the first on that is not the context's own: usually all that follow the
    context's. Where the tokenizer makes one token of the context's end and the continuation's beginning, that token is scored
    too. (lm-eval drops as many tokens as the context alone has, and so loses the first of the continuation there.)
    """
    kept = context.rstrip()
    whole, alone = tokenizer.encode(context + continuation), tokenizer.encode(kept)
    seam = _common(whole, alone)
    return Pair(tuple(whole[:seam]), tuple(whole[seam:]))


@memory.reused()
@torch.no_grad()
def likelihoods(
    reader: Reader, pairs: Sequence[Pair], *, progress: Callable[[int, int], None] | None = None
) -> Likelihoods:
    """How likely each continuation is after its context.

    Args:
        reader: the model.
        pairs: P of them, in any order: those of equal contexts are read together.
        progress: is told how many pairs are done, and how many there are.
    """
    found = Likelihoods(np.zeros(len(pairs)), np.zeros(len(pairs), np.int64), np.ones(len(pairs), bool))
    asked: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for i, pair in enumerate(pairs):
        before, goals = reader.placed(pair)
        found.tokens[i] = len(goals)
        if goals:
            asked.setdefault(before, []).append((i, goals))
    done = int(np.count_nonzero(found.tokens == 0))
    model, ctx_len = reader.model, reader.ctx_len
    for shared, contexts in _families(list(asked)):
        begun = reader.begin
        if shared:
            _, begun = read(model, contexts[0][:shared], begun, ctx_len)
        contexts.sort(key=len, reverse=True)  # the largest first: too little memory shows at once
        for some in _batches(contexts, reader.batch):
            state = None if begun is None else select(begun, [0] * len(some))
            logits, after = read_together(model, [context[shared:] for context in some], state, ctx_len)
            rows = [(row, i, goals) for row, context in enumerate(some) for i, goals in asked[context]]
            rows.sort(key=lambda row: len(row[2]), reverse=True)
            for several in _batches(rows, reader.batch):
                _continue(reader, several, logits, after, found)
            done += len(rows)
            if progress is not None:
                progress(done, len(pairs))
    return found


def _families(contexts: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """The contexts by what they have in common, and how many tokens that is; the last family has nothing in common.

    A family shares its first _PREAMBLE tokens at least: examples that stand before every question, for instance.
    """
    by_beginning: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for context in contexts:
        beginning = context[:_PREAMBLE] if len(context) > _PREAMBLE else ()
        by_beginning.setdefault(beginning, []).append(context)
    alone = by_beginning.pop((), [])
    for members in by_beginning.values():
        if len(members) == 1:
            alone += members
        else:
            shared = _common(min(members), max(members))  # between these two in the order of words lie all others
            yield min(shared, min(map(len, members)) - 1), members  # each is left a token, whose logits come next
    if alone:
        yield 0, alone


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with that are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _batches(of: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for at in range(0, len(of), size):
        yield of[at : at + size]


def _continue(
    reader: Reader,
    rows: Sequence[tuple[int, int, tuple[int, ...]]],
    logits: Tensor,
    after: State,
    found: Likelihoods,
) -> None:
    """Score continuations: (row of `logits` and `after`, number in `found`, tokens) each, the longest first."""
    device, numbers = logits.device, [i for _, i, _ in rows]
    where, longest = [row for row, _, _ in rows], len(rows[0][2])
    targets = torch.full((len(rows), longest), IGNORE, dtype=torch.int64)
    for row, (_, _, goals) in enumerate(rows):
        targets[row, : len(goals)] = torch.tensor(goals)
    targets = targets.to(device)
    nats, greedy = _judged(logits[where], targets[:, 0])
    total, right = nats.double(), greedy
    if longest > 1:
        state = select(after, where)
        inputs = targets.clamp(min=END)
        for at in range(0, longest - 1, reader.ctx_len):
            stop = min(at + reader.ctx_len, longest - 1)
            features, state = reader.model.features(inputs[:, at:stop], state)
            wanted = (targets[:, at + 1 : stop + 1] != IGNORE).nonzero()
            for first in range(0, len(wanted), _ROWS):
                of, column = wanted[first : first + _ROWS].unbind(1)
                nats, greedy = _judged(reader.model.head(features[of, column]), targets[of, at + 1 + column])
                total.index_add_(0, of, nats.double())
                right[of[~greedy]] = False
    found.nats[numbers], found.greedy[numbers] = total.cpu().numpy(), right.cpu().numpy()


def _judged(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each position in nats, and whether its target is the likeliest token; logits (R, V), targets (R,)."""
    logits = logits.float()
    nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    greedy = logits.gather(-1, targets[:, None])[:, 0] >= logits.amax(-1)  # argmax takes five times as long
    greedy[greedy.clone()] = logits[greedy].argmax(-1) == targets[greedy]  # of equal ones it takes the first
    return nats, greedy
