"""A conversation in RWKV World's convention: "User: ...", "Assistant: ...", a blank line between turns and none inside one."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rwkv_core.data.dialogue import TURN, one_turn
from rwkv_core.errors import InputError
from rwkv_core.generation.opened import open_model
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import Continuation, stream
from rwkv_core.models.skeleton import RWKV
from rwkv_core.models.state import State
from rwkv_core.tokenizer import Tokenizer

SLICE = 512
"""Tokens of a message that the model reads at once. It bounds the memory."""


def as_document(turns: Iterable[tuple[str, str]]) -> str:
    """Turns, each its role and content, as a document of the training data has them. What is still to be said is "".

    Blank lines are left out but in answers, which the model has said so.
    """
    said = ((role, text.strip() if role == "Assistant" else one_turn(text)) for role, text in turns)
    return "\n\n".join(f"{role}: {text}" if text else f"{role}:" for role, text in said)


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
        said = (said for question, answer in self._turns for said in (("User", question), ("Assistant", answer)))
        return as_document([*self._opening(), *said])

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
        asked = [("User", message), ("Assistant", "")]
        if self.last is None:
            state, text = self._start, as_document([*self._opening(), *asked])
        else:
            said = f"{self.last.text.rstrip(chr(10))}\n\n{as_document(asked)}"
            state, text = self.last.state, self.last.unread(said)
        return self._continue(state, text, self._turns, message, halt)

    def retry(self, halt: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Another answer to the last message, in place of the one it got; `halt` and errors as of `answer`.

        Raises:
            InputError: nothing was said yet.
        """
        if self.last is None:
            raise InputError("there is no answer yet", "only an answer can be tried again", "say something")
        return self._continue(*self._asked, self._turns[:-1], self._turns[-1][0], halt)

    def _opening(self) -> list[tuple[str, str]]:
        return [("System", self._system)] if self._system.strip() else []

    def _continue(
        self, state: State | None, text: str, turns: list[tuple[str, str]], message: str, halt: Callable[[], bool]
    ) -> Iterator[str]:
        """Answer `message`, after `turns`: in the model's words, read `text` after `state`."""
        sampling = replace(self._sampling, seed=self._sampling.seed + self._answers)
        self._answers += 1
        begun = False
        for piece in stream(
            self._model, self._tokenizer, [text], sampling, ctx_len=SLICE, batch=1, states=[state], halt=halt
        ):
            shown = piece.text if begun else piece.text.lstrip()  # the blank after the colon
            begun = begun or bool(shown)
            if piece.whole is not None:
                self._asked, self.last = (state, text), piece.whole
                self._turns = [*turns, (message, piece.whole.text.strip())]
            if shown:
                yield shown


def open_chat(path: Path, sampling: Sampling, *, system: str = "", **how: Any) -> Chat:
    """A conversation with the model in a checkpoint.

    Args:
        path: the model.
        sampling: of each answer.
        system: said to the model before the first turn.
        how: of `open_model`, as its errors are.
    """
    opened = open_model(path, **how)
    return Chat(opened.model, opened.tokenizer, sampling, system=system, state=opened.begin)
