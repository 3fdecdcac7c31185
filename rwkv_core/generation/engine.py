"""Many texts go on at once: whoever asks joins the batch that runs, and leaves it when his answer ends.

A thread has the model. Before each token it reads a slice of the next prompt, so nobody waits for the whole of another's.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_core.errors import InputError, WorldError
from rwkv_core.generation.cache import Cache
from rwkv_core.generation.opened import Opened
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import Batch, Piece, read
from rwkv_core.models.state import State
from rwkv_core.tokenizer import END

_SLICE = 512
"""Tokens of a prompt that are read at once while nobody else waits for a token: as in a chat."""

_BESIDE = 64
"""The same while others do: each of them waits for so many more between two tokens."""

_WAITING = 64
"""Prompts that may wait for room; more are refused."""

Told = Piece | Exception
"""What one who asked is told: a piece of one of his continuations, or why there are none."""


@dataclass
class Asked:
    """A prompt and what is to come of it."""

    ids: list[int]
    """What is read, token 0 before the first text with it."""
    rows: Sequence[int]
    """Numbers of the continuations, which their draws depend on."""
    sampling: Sampling
    tell: Callable[[Told], None]
    """Is called from the thread that has the model."""
    left: bool = False
    """Whether nobody listens any more."""
    known: int = 0
    """Tokens at its beginning that were read before, for another: as of the first piece."""
    at: int = 0
    """Tokens that are read."""
    before: State | None = None
    """After those."""
    logits: Tensor | None = None
    """Likewise."""

    def leave(self) -> None:
        """Want no more of it: its continuations end before their next token."""
        self.left = True


class Engine:
    """Answers in the order of asking, as many at once as there is room for."""

    def __init__(self, opened: Opened, *, rows: int, cache_bytes: int) -> None:
        """Start the thread; `close` ends it.

        Args:
            opened: the model.
            rows: continuations side by side.
            cache_bytes: of the states of texts that were read.
        """
        self.tokenizer, self._begin, self._most = opened.tokenizer, opened.begin, rows
        self._model, self._batch, self.cache = opened.model, Batch(opened.model, opened.tokenizer), Cache(cache_bytes)
        self._owners = list[Asked]()
        """Who asked for each row of the batch."""
        self._waiting, self._reading = deque[Asked](), list[Asked]()
        self._changed, self._closed = threading.Condition(), False
        self.begun = int(opened.begin is None)
        """Tokens that are read before each text: 0's, or none after a tuned state."""
        self.read_tokens = 0
        """Tokens of prompts that went through the model."""
        self.steps = 0
        """Times that a token was read for every row of the batch."""
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def ask(
        self, prompt: str | Sequence[int], rows: Sequence[int], sampling: Sampling, tell: Callable[[Told], None]
    ) -> Asked:
        """Ask for continuations of a prompt.

        Args:
            prompt: a text, or its tokens.
            rows: numbers of the continuations: each draws from the seed and its number, as of `stream`.
            sampling: how to draw, and when to stop.
            tell: is given each piece, the last of each continuation with the whole, or one exception and nothing more; from
                another thread.

        Raises:
            InputError: there are more continuations than room; the prompt has no token to go on from, or a wrong one.
            WorldError: too many wait, or the engine is closed.
        """
        if not 1 <= len(rows) <= self._most:
            raise InputError(f"{len(rows)} continuations", f"1 to {self._most} fit in the batch", "ask for fewer")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        size = len(self.tokenizer.table)
        wrong = [token for token in ids if not 0 <= token < size]
        if wrong:
            raise InputError(f"token {wrong[0]}", f"tokens are 0 to {size - 1}", "correct the prompt")
        ids = [*([END] if self._begin is None else []), *ids]
        if not ids:
            raise InputError("the prompt is empty", "after a tuned state there must be something to read", "add some")
        asked = Asked(ids, rows, sampling, tell)
        with self._changed:
            if self._closed:
                raise WorldError("the server", "it is stopping", "start it again")
            if len(self._waiting) >= _WAITING:
                raise WorldError(f"{_WAITING} prompts wait", "that is the most", "try again later")
            self._waiting.append(asked)
            self._changed.notify()
        return asked

    def load(self) -> tuple[int, int]:
        """Continuations that go on, and prompts that wait or are being read."""
        return len(self._owners), len(self._waiting) + len(self._reading)

    def close(self) -> None:
        """End all continuations and the thread; whoever waits is told so."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while self._work():
            try:
                self._read_some()
                if self._batch:
                    self._draw()
                if self._batch:
                    self._batch.advance()
                    self.steps += 1
            except Exception as error:  # of no one prompt: memory, or a model whose logits are not finite
                self._fail(error)
        self._fail(WorldError("the server", "it is stopping", "start it again"))

    def _work(self) -> bool:
        """Wait until there is some. False: it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._batch or self._reading or self._waiting)
            return not self._closed

    @torch.no_grad()
    def _read_some(self) -> None:
        """A slice of the first prompt that waits, if there is room for its continuations."""
        if not self._reading:
            with self._changed:
                while self._waiting and self._waiting[0].left:
                    self._waiting.popleft()
                if not self._waiting or len(self._batch) + len(self._waiting[0].rows) > self._most:
                    return
                self._reading.append(self._waiting.popleft())
            self._recall(self._reading[0])
        [asked] = self._reading
        if asked.left:
            self._reading.clear()
            return
        if asked.at < len(asked.ids):
            some = asked.ids[asked.at :][: _BESIDE if self._batch else _SLICE]
            asked.logits, asked.before = read(self._model, some, asked.before, len(some))
            asked.at += len(some)
            self.read_tokens += len(some)
        if asked.at == len(asked.ids) and asked.logits is not None and asked.before is not None:
            self._reading.clear()
            self.cache.put(asked.ids, asked.before, asked.logits)
            for number in asked.rows:
                self._batch.join(number, asked.sampling, asked.logits, asked.before)
                self._owners.append(asked)

    def _recall(self, asked: Asked) -> None:
        """Begin where a known text ends, or at the beginning."""
        known = self.cache.longest(asked.ids)
        if known is None:
            asked.before = self._begin
        else:
            asked.before, asked.logits, asked.at = known.state, known.logits, known.length
            asked.known = known.length

    def _draw(self) -> None:
        going = list(range(len(self._owners)))
        for place, piece in self._batch.draw([asked.left for asked in self._owners]):
            asked = self._owners[place]
            if piece.whole is not None:
                going.remove(place)
                self.cache.put([*asked.ids, *piece.whole.tokens], piece.whole.state)
            if not asked.left:
                asked.tell(piece)
        self._owners = [self._owners[place] for place in going]

    def _fail(self, error: Exception) -> None:
        """Tell all who wait, and begin anew."""
        with self._changed:
            everyone = [*self._owners, *self._reading, *(self._waiting if self._closed else ())]
            self._reading.clear()
            if self._closed:
                self._waiting.clear()
        self._owners, self._batch = [], Batch(self._model, self.tokenizer)
        for asked in {id(asked): asked for asked in everyone}.values():
            if not asked.left:
                asked.tell(error)
