"""Thoughts of G1 models: how one asks for them, and how an answer is parted into what is thought and what is said.

    User: What is 2 + 2? think a bit

    Assistant: <think>Easy.</think>
    4

Source: the model cards of RWKV7-G1, huggingface.co/BlinkDL/rwkv7-g1.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

Effort = Literal["none", "minimal", "low", "medium", "high"]
"""OpenAI's words for how much to think."""

_OPEN, _CLOSE = "<think>", "</think>"


class Way(NamedTuple):
    """How an effort is asked for."""

    suffix: str
    """Behind the last question."""
    begun: str
    """What the answer begins with. Its ">" is the model's to write, as a token may begin with it."""


WAYS: Mapping[Effort, Way] = {
    "none": Way("", ""),
    "minimal": Way("", "<think>\n</think"),
    "low": Way(" think a bit", "<think"),
    "medium": Way("", "<think"),
    "high": Way(" think a lot", "<think"),
}
"""minimal: the thought is empty. none: an answer as of any model, and what it thinks by itself is part of it."""


class Thoughts:
    """Parts an answer as it comes. What is thought and what is said begin without blanks."""

    def __init__(self, effort: Effort) -> None:
        """Of an answer that was asked for with this effort, and continues `WAYS[effort].begun`."""
        self._held = WAYS[effort].begun
        self._part: Literal["opening", "thought", "said"] = "opening" if self._held else "said"
        self._begun = False

    def push(self, new: str, *, final: bool = False) -> tuple[str, str]:
        """What has been thought and what has been said with this piece; nothing is held back after the final one."""
        self._held += new
        thought = said = ""
        if self._part == "opening" and (final or len(self._held) >= len(_OPEN)):
            self._part = "thought" if self._held.startswith(_OPEN) else "said"
            self._held = self._held.removeprefix(_OPEN)
        if self._part == "thought":
            thought, closed, rest = self._held.partition(_CLOSE)
            if closed:
                self._held = rest
            else:
                held = next((n for n in range(len(_CLOSE) - 1, 0, -1) if thought.endswith(_CLOSE[:n])), 0)
                held = 0 if final else held
                thought, self._held = thought[: len(thought) - held], thought[len(thought) - held :]
            thought = self._from_its_beginning(thought)
            if closed:
                self._part, self._begun = "said", False
        if self._part == "said":
            said, self._held = self._from_its_beginning(self._held), ""
        return thought, said

    def _from_its_beginning(self, text: str) -> str:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return text
