"""A conversation in RWKV World's convention: "User: ...", "Assistant: ...", a blank line between turns and none inside one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from rwkv_core import checkpoint, models
from rwkv_core.adapters import file
from rwkv_core.adapters.state import give
from rwkv_core.checkpoint import DTYPES, Dtype
from rwkv_core.data.dialogue import TURN, one_turn
from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import sha256
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import Continuation, stream
from rwkv_core.merge import merged
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import State, mount
from rwkv_core.tokenizer import Tokenizer, for_vocabulary

_SLICE = 512
"""Tokens of a message that the model reads at once. It bounds the memory."""


class Chat:
    """The model answers a user. It reads each turn once: what was said before is in its state."""

    def __init__(
        self, model: RWKV, tokenizer: Tokenizer, sampling: Sampling, *, system: str = "", state: State | None = None
    ) -> None:
        """A conversation that has not begun.

        Args:
            model: in evaluation mode.
            tokenizer: of its vocabulary.
            sampling: of each answer. The first draws from its seed, each later one from the next.
            system: said to the model before the first turn.
            state: tuned; the conversation begins from it. None: from a token 0, as a document in training.
        """
        self._model, self._tokenizer, self._start = model, tokenizer, state
        self._sampling = replace(sampling, stop=(*sampling.stop, TURN))
        self._system = system
        self._answers = 0
        self.reset()

    def reset(self) -> None:
        """Forget all that was said."""
        self._turns: list[tuple[str, str]] = []
        self._asked: tuple[State | None, str] = (None, "")
        self.last: Continuation | None = None
        """The last answer."""

    @property
    def transcript(self) -> str:
        """What was said, as a document of the training data has it."""
        turns = (f"User: {message}\n\nAssistant: {answer}" for message, answer in self._turns)
        return "\n\n".join([*self._opening(), *turns])

    def answer(self, message: str, halt: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Say something, and get the answer in pieces of text.

        The turn counts once the answer has ended; a caller that stops listening before has not said it.

        Args:
            message: blank lines in it are left out, for one would end the turn.
            halt: asked before each token; when true, the answer ends there, and the conversation goes on from there.

        Raises:
            InputError: there is nothing in the message, or it can't be encoded.
            WorldError: the model's logits are not finite.
        """
        message = one_turn(message)
        if not message:
            raise InputError("the message is empty", "an answer needs a question", "say something")
        turn = f"User: {message}\n\nAssistant:"
        if self.last is None:
            state, text = self._start, "\n\n".join([*self._opening(), turn])
        else:
            state, text = self.last.state, self.last.unread(f"{self.last.text.rstrip(chr(10))}\n\n{turn}")
        return self._continue(state, text, self._turns, message, halt)

    def retry(self, halt: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Another answer to the last message, in place of the one it got; `halt` and errors as of `answer`.

        Raises:
            InputError: nothing was said yet.
        """
        if self.last is None:
            raise InputError("there is no answer yet", "only an answer can be tried again", "say something")
        return self._continue(*self._asked, self._turns[:-1], self._turns[-1][0], halt)

    def _opening(self) -> list[str]:
        return [f"System: {one_turn(self._system)}"] if self._system.strip() else []

    def _continue(
        self, state: State | None, text: str, turns: list[tuple[str, str]], message: str, halt: Callable[[], bool]
    ) -> Iterator[str]:
        """Answer `message`, after `turns`: in the model's words, read `text` after `state`."""
        sampling = replace(self._sampling, seed=self._sampling.seed + self._answers)
        self._answers += 1
        begun = False
        for piece in stream(
            self._model, self._tokenizer, [text], sampling, ctx_len=_SLICE, batch=1, states=[state], halt=halt
        ):
            shown = piece.text if begun else piece.text.lstrip()  # the blank after the colon
            begun = begun or bool(shown)
            if piece.whole is not None:
                self._asked, self.last = (state, text), piece.whole
                self._turns = [*turns, (message, piece.whole.text.strip())]
            if shown:
                yield shown


def open_chat(
    path: Path,
    sampling: Sampling,
    *,
    adapter: Path | None = None,
    state: Path | None = None,
    tokenizer: Path | None = None,
    special: Mapping[str, int] | None = None,
    system: str = "",
    dtype: Dtype = "as_loaded",
    device: Literal["cpu", "cuda"] | None = None,
    head_size_divisor: float | None = None,
) -> Chat:
    """A conversation with the model in a checkpoint.

    Args:
        path: the model.
        sampling: of each answer.
        adapter: trained on it, of RWKV-Flow. If it has a tuned state, the conversation begins from that.
        state: a file of a state tuned on it; the conversation begins from it.
        tokenizer: a `tokenizers` file, where the vocabulary is none of ours.
        special: texts that are a token each, as in the training's `data.special_tokens`.
        system: said to the model before the first turn.
        dtype: what to compute in.
        device: where to compute; None is cuda where there is one.
        head_size_divisor: as of `models.load`.

    Raises:
        InputError: a file can't be read, or does not fit the model; or two states are given.
        WorldError: the device or a package is missing.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise WorldError("device cuda", "torch finds no CUDA device here", "take cpu")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = models.load(path, dtype=DTYPES.get(dtype), device=where, head_size_divisor=head_size_divisor)
    words = for_vocabulary(model.config.vocab_size, tokenizer).with_special(special or {})
    tuned = adapter is not None and _put_in(model, path, adapter)
    if tuned and state is not None:
        raise InputError(f"--state {state}", f"{adapter} has a state of its own", "give one of them")
    begin = model.initial_state(1) if tuned else None
    if state is not None:
        begin = mount(model.initial_state(1), checkpoint.read(state))
    return Chat(model.eval(), words, sampling, system=system, state=begin)


@torch.no_grad()
def _put_in(model: RWKV, base: Path, adapter: Path) -> bool:
    """Merge the adapter into the loaded model: tokens then cost no more than the base's. Whether it has a tuned state."""
    parts, record = file.read_for(base, sha256(base), adapter, "give that one")
    give(model, record.adapter.state)
    tensors = model.state_dict()
    adapted, replaced = merged(tensors, parts, record.adapter, adapter, record.quantize)
    for name, make in (adapted | replaced).items():
        tensors[name].copy_(make())
    return record.adapter.state != "none"
