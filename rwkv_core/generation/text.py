"""Continuations of prompts, several at once, as text that comes out as soon as it is certain.

Shapes: B batch, T time, C channels, V vocabulary.
"""

import codecs
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rwkv_core.errors import InputError
from rwkv_core.generation.sampling import Draws, Likely, Sampling, likely
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import State, concatenate, select
from rwkv_core.tokenizer import END, Tokenizer

Ending = Literal["end", "stop", "length", "halted"]
"""Why a continuation ended: token 0 or one without text; a stop text; max_tokens; its caller wished it."""


@dataclass(frozen=True)
class Continuation:
    """What came after a prompt."""

    text: str
    """Without the prompt and the stop text; U+FFFD where its bytes are not UTF-8, or end inside a character."""
    ending: Ending
    state: State
    """Of one row: after the prompt and `read`."""
    read: str
    """What the model has read after the prompt: where a stop text was found, the beginning of that also."""
    tokens: tuple[int, ...] = ()
    """The tokens of `read`. One more was drawn where the ending is "end" or "stop"."""

    def unread(self, text: str) -> str:
        """What is left to read from `state` on, so that the model has read `text`: this continuation, and what follows it."""
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.read, text, strict=False))
        return text[sum(1 for _ in same) :]


class Drawn(NamedTuple):
    """A token of a continuation, told where `Sampling.logprobs` asks for it."""

    at: int
    """Where its text begins, in characters of the continuation's; in the midst of a character, where that begins."""
    chosen: Likely
    best: tuple[Likely, ...]


class Piece(NamedTuple):
    """A step of one continuation."""

    row: int
    """Number of its prompt."""
    text: str
    """What is certain now; the pieces make up the continuation's text."""
    whole: Continuation | None
    """With the last piece."""
    drawn: tuple[Drawn, ...] = ()
    """The tokens that begin in `text`, if they were asked for: none that is of a stop text alone, nor the one that ended it."""


class Output:
    """Text from bytes, as soon as it is certain: no half characters, and nothing that may turn out to be a stop text.

    Where the bytes are cut does not matter. The text ends where a stop text is complete for the first time.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False
        """Whether a stop text was found."""

    @property
    def held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def push(self, data: bytes) -> str:
        """The text that has become certain with these bytes."""
        return self._certain(self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back, if no bytes follow."""
        text = self._certain(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _certain(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._held, self.stopped = "", True
            return text[: min(found)[1]]
        held = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


class _Row:
    """One continuation in the making."""

    def __init__(self, number: int, sampling: Sampling, tokenizer: Tokenizer) -> None:
        self.number, self._tokenizer, self._limit = number, tokenizer, sampling.max_tokens
        self._draws, self._output = Draws(sampling, number), Output(sampling.stop)
        self._logprobs, self._drawn = sampling.logprobs, deque[Drawn]()
        self.tokens = list[int]()
        """Those that the model has read, or reads next."""
        self._text = ""
        self.ending: Ending | None = None

    def advance(self, logits: Tensor, halted: bool) -> str:
        """Draw a token, or end: `ending` says which. The text that has become certain."""
        token = END
        if halted or len(self.tokens) == self._limit:
            self.ending = "halted" if halted else "length"
        else:
            token = self._draws.next(logits)
            if self._logprobs is not None:
                self._drawn.append(Drawn(len(self._text) + self._output.held, *likely(logits, token, self._logprobs)))
        table = self._tokenizer.table
        data = table[token] if token < len(table) else b""  # a row that fills the embedding up
        new = self._output.push(data)
        if self._output.stopped:
            self.ending = "stop"
        elif self.ending or not data:  # the free ids of a vocabulary have no text, as END
            self.ending = self.ending or "end"
            new += self._output.finish()
        else:
            self.tokens.append(token)
        self._text += new
        return new

    def drawn(self) -> tuple[Drawn, ...]:
        """The tokens that begin in the text that is certain, each told once."""
        told = list[Drawn]()
        while self._drawn and self._drawn[0].at < len(self._text):
            told.append(self._drawn.popleft())
        return tuple(told)

    def whole(self, state: State) -> Continuation | None:
        """The continuation, if it has ended. `state` is of this row."""
        if self.ending is None:
            return None
        return Continuation(self._text, self.ending, state, self._tokenizer.decode(self.tokens), tuple(self.tokens))


class Batch:
    """Continuations side by side. Between two tokens any may join, and those that have ended leave."""

    def __init__(self, model: RWKV, tokenizer: Tokenizer) -> None:
        """An empty one.

        Args:
            model: in evaluation mode, on any device.
            tokenizer: of its vocabulary.
        """
        self._model, self._tokenizer = model, tokenizer
        self._rows, self._state, self._logits = list[_Row](), State(), torch.empty(0)

    def __len__(self) -> int:
        return len(self._rows)

    def join(self, number: int, sampling: Sampling, logits: Tensor, state: State) -> None:
        """Begin a continuation of what was read.

        Args:
            number: of its row: its draws depend on it, and its pieces have it. Two of one number draw alike.
            sampling: how to draw, and when to stop.
            logits: (1, V) after the last token that was read.
            state: of one row, after it.
        """
        self._logits = torch.cat((self._logits, logits)) if self._rows else logits
        self._state = concatenate([self._state, state]) if self._rows else state
        self._rows.append(_Row(number, sampling, self._tokenizer))

    def draw(self, halted: Sequence[bool]) -> Iterator[tuple[int, Piece]]:
        """A token for each row, or its end: the row's place as of now, and its piece where there is one.

        Those that have ended are gone once all are drawn, and the others move up in their order.

        Args:
            halted: of each row, whether it ends as it is.

        Raises:
            WorldError: a row's logits are not finite.
        """
        for i, row in enumerate(self._rows):
            text = row.advance(self._logits[i], halted[i])
            if text or row.ending:
                whole = row.whole(select(self._state, [i])) if row.ending else None
                yield i, Piece(row.number, text, whole, row.drawn())
        going = [i for i, row in enumerate(self._rows) if row.ending is None]
        if 0 < len(going) < len(self._rows):
            self._state = select(self._state, going)
        self._rows = [self._rows[i] for i in going]

    @torch.no_grad()
    def advance(self) -> None:
        """Read the token that was drawn for each row; there is one at least."""
        tokens = torch.tensor([row.tokens[-1:] for row in self._rows], device=self._model.emb.weight.device)
        features, self._state = self._model.features(tokens, self._state)
        self._logits = self._model.head(features[:, -1])


@torch.no_grad()
def stream(
    model: RWKV,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    ctx_len: int,
    batch: int,
    states: Sequence[State | None] | None = None,
    halt: Callable[[], bool] = lambda: False,
) -> Iterator[Piece]:
    """Continue every prompt, and yield the pieces as they become certain.

    A continuation that ends makes room for the next prompt. What is drawn for a prompt depends on the seed and its number, not
    on its neighbours; their number may change the logits in their last digits, as matrix products of other sizes do.

    Args:
        model: in evaluation mode, on any device.
        tokenizer: of its vocabulary.
        prompts: what to continue. For a chat, each ends with "Assistant:", without a blank.
        sampling: how to draw, and when to stop.
        ctx_len: tokens of a prompt that go through the model at once. It bounds the memory.
        batch: continuations side by side; prompts too are read together, so those of like length should be neighbours.
        states: for each prompt the state of one row that it is read after, such as a continuation's or a tuned one; None: it
            begins a document, so the model reads token 0 first, as before every document in training.
        halt: asked before every token; when true, all continuations end as they are, and what waits has none.

    Raises:
        InputError: a prompt after a state is empty, so there is nothing to predict from.
        WorldError: the model's logits are not finite.
    """
    waiting, rows = deque(enumerate(prompts)), Batch(model, tokenizer)
    while waiting or rows:
        halted = halt()
        found = [] if halted else [waiting.popleft() for _ in range(min(len(waiting), batch - len(rows)))]
        if found:
            befores = [states[number] if states is not None else None for number, _ in found]
            texts = [
                [*([END] if before is None else []), *tokenizer.encode(prompt)]
                for (_, prompt), before in zip(found, befores, strict=True)
            ]
            for (number, _), ids in zip(found, texts, strict=True):
                if not ids:
                    raise InputError(
                        f"prompt {number} is empty", "a text that goes on must go on with something", "add some"
                    )
            logits, state = read_together(model, texts, _side_by_side(model, befores), ctx_len)
            for i, (number, _) in enumerate(found):
                rows.join(number, sampling, logits[i : i + 1], select(state, [i]))
        for _, piece in rows.draw([halted] * len(rows)):
            yield piece
        if rows:
            rows.advance()
        elif halted:
            return


def generate(
    model: RWKV,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    ctx_len: int,
    batch: int,
    states: Sequence[State | None] | None = None,
) -> list[Continuation]:
    """The continuation of every prompt, in their order; arguments and errors as of `stream`."""
    pieces = stream(model, tokenizer, prompts, sampling, ctx_len=ctx_len, batch=batch, states=states)
    done = {piece.row: piece.whole for piece in pieces if piece.whole is not None}
    return [done[i] for i in range(len(prompts))]


def _side_by_side(model: RWKV, states: Sequence[State | None]) -> State | None:
    """The states of single rows as one batch; None where nothing was read before any."""
    if all(one is None for one in states):
        return None
    return concatenate([one if one is not None else model.initial_state(1) for one in states])


def read(model: RWKV, ids: Sequence[int], state: State | None, ctx_len: int) -> tuple[Tensor, State]:
    """Take one text in, `ctx_len` tokens at a time: the logits (1, V) after its last token, and the state.

    Args:
        model: in evaluation mode.
        ids: at least one token.
        state: before the text, of one row; None is the model's initial one.
        ctx_len: at least 1.
    """
    return read_together(model, [ids], state, ctx_len)


@torch.no_grad()
def read_together(
    model: RWKV, texts: Sequence[Sequence[int]], state: State | None, ctx_len: int
) -> tuple[Tensor, State]:
    """Take several texts in side by side: for each the logits (B, V) after its last token, and the state there.

    Nothing is padded, for what a row reads stays in its state: where a text ends, its row leaves the batch. Texts of one length
    are read in as many calls of the model as one is, so give those of like length together.

    Args:
        model: in evaluation mode.
        texts: B of them, of at least one token each.
        state: before the texts, of B rows; None is the model's initial one.
        ctx_len: tokens of each text that go through the model at once, at least 1.
    """
    device = model.emb.weight.device
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    left, at = order, 0
    if state is not None and order != list(range(len(texts))):
        state = select(state, order)
    logits, states = list[Tensor](), list[State]()
    while left:
        stop = len(texts[left[0]])
        tokens = torch.tensor([texts[i][at:stop] for i in left], device=device)
        for start in range(0, stop - at, ctx_len):
            features, state = model.features(tokens[:, start : start + ctx_len], state)
        if state is None:
            raise ValueError("a text has no tokens")
        ended = sum(len(texts[i]) == stop for i in left)
        logits.append(model.head(features[:ended, -1]))
        states.append(state if ended == len(left) else select(state, range(ended)))
        state = select(state, range(ended, len(left))) if ended < len(left) else state
        left, at = left[ended:], stop
    if len(states) == 1 and order == list(range(len(texts))):
        return logits[0], states[0]
    back = [order.index(i) for i in range(len(texts))]
    return torch.cat(logits)[back], select(concatenate(states), back)
