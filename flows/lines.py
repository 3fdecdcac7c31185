"""A program's output as lines for a log, progress bars included."""

import re
from collections.abc import Iterator
from typing import NamedTuple

PROGRESS_EVERY = 2.0
"""Seconds between two looks at a progress bar. It is redrawn many times a second, and a log keeps every line."""

_COLOURS = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class Line(NamedTuple):
    """A line of a log."""

    text: str
    progress: bool
    """It is a progress bar at some moment, not something said."""


class Lines:
    """Takes bytes as they come, gives lines: plain ones at once, of one redrawn with a carriage return its last state.

    A redrawn line is given at most every `PROGRESS_EVERY` seconds, and before the next plain line: each comes after what
    came before it, and the last state always comes.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._progress = ""
        self._given = float("-inf")

    def feed(self, data: bytes, now: float, *, final: bool = False) -> Iterator[Line]:
        """The lines that `data` completes.

        Args:
            data: what was read since the last call.
            now: seconds on any steady clock.
            final: nothing comes after this.
        """
        *whole, self._rest = (self._rest + data).split(b"\n")
        if final and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        for line in whole:
            yield from self._line(line.removesuffix(b"\r"))
        if b"\r" in self._rest:
            self._progress = _last_state(self._rest) or self._progress
            self._rest = b"\r" + self._rest.rsplit(b"\r", 1)[1]  # a bar that never ends its line must not pile up
        if self._progress and (final or now - self._given >= PROGRESS_EVERY):
            yield Line(self._progress, progress=True)
            self._progress, self._given = "", now

    def _line(self, line: bytes) -> Iterator[Line]:
        text = _last_state(line)
        if b"\r" in line:
            self._progress = text or self._progress
        elif text:
            if self._progress:  # the bar is over, or something else is said in between
                yield Line(self._progress, progress=True)
                self._progress = ""
            yield Line(text, progress=False)


def _last_state(line: bytes) -> str:
    """What a terminal would show of `line`: the last thing drawn that is not blank."""
    states = (_COLOURS.sub(b"", state).rstrip() for state in reversed(line.split(b"\r")))
    return next((state for state in states if state), b"").decode(errors="replace")
