"""What is likely wrong with a text though it can be learned: a model learns such faults, and nothing else will say so."""

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from rwkv_core.data.dialogue import WIDE_COLON, Turn, begins_with_a_turn, turns
from rwkv_core.tokenizer import Tokenizer


class Code(StrEnum):
    """The faults that are looked for."""

    FULL_WIDTH_COLON = "full-width-colon"
    """"User：" in place of "User:". It begins no turn, and its tokens are other ones than those a client sends."""
    COLON_BLANK = "colon-blank"
    """None or more than one blank after a role's colon. A prompt ends at the colon, and an answer begins with one blank."""
    DOUBLED_ROLE = "doubled-role"
    """A turn that begins with another role, "User: User: ..."."""
    MISSING_ANSWER = "missing-answer"
    """The conversation ends with a turn that nobody answers."""
    EMPTY_ANSWER = "empty-answer"
    """An answer that says nothing. qa passes it over; else the model learns to say nothing."""
    UNCLOSED_THOUGHT = "unclosed-thought"
    """<think> without </think> in an answer."""
    BLANK_LINE = "blank-line"
    """A blank line inside a turn. Clients that stop at blank lines end the answer there; G1 models can bear it."""
    UNREACHABLE_STOP = "unreachable-stop"
    r"""An answer whose blank line is not the token "\n\n", at which llama.cpp stops: after 。 it is two, "。\n" being one."""
    CARRIAGE_RETURN = "carriage-return"
    r"""\r: line ends of Windows. The model learns to write them."""
    CONTROL = "control"
    """A control character other than the tabulator and line ends."""
    MOJIBAKE = "mojibake"
    """Text that was read in another encoding than it was written in: "cafÃ©", "â€™", U+FFFD."""
    END_TEXT = "end-text"
    """<|endoftext|> in letters. The end of a document is token 0, which is put there anyway; this would be learned as text."""


class Finding(NamedTuple):
    """One fault in one text: the first of its kind in it."""

    code: Code
    at: int
    """The character, from 0."""
    message: str
    """The text there, and what to do."""


_DOUBLED = re.compile(r"\s*(?:System|User|Human|Assistant|Bot)[:：]")  # others head good answers: "Input: a number"
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")

_CONTROLS = bytes(byte for byte in (*range(32), 127) if byte not in b"\t\n\r")
_CONTROL = re.compile(f"[{re.escape(_CONTROLS.decode())}]")

# UTF-8 that was read as cp1252 or Latin-1. Its bytes 80 to BF, which go on a character, are these then:
_ON = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
# Two such characters may meet in good text, as in «AMANHû and "Ä–Z", so a small letter must stand beside them, or a sign that
# no word has after Â; three pairs, or two triples, in a row do not meet. Characters 80 to 9F are controls that nobody means.
# In 100 MB of programs' messages, in 170 locales, it found 34 of 116 000 texts of twenty messages, all of them rightly.
_MOJIBAKE = re.compile(
    rf"\ufffd|锟斤拷|[\u0080-\u009f]|â€|â„¢|â‚¬|ï»¿|ðŸ|(?<=[a-z])[Â-ÖØ-Ù][{_ON}]|Ã(?!\u00a0)[{_ON}](?=[a-z])|Ã\u00a0(?= )"
    rf"|Â[£§©®°±²³µ·º¼½¾]|(?<=[0-9.,])Â\u00a0|(?:[Â-ß][{_ON}]){{3}}|(?:[à-ï][{_ON}]{{2}}){{2}}"
)

# What each of these has, for a text without them costs a twentieth so: in bytes, a character from Â to ð right before another
# that is not ASCII, or a control character; else one of two signs.
_MAYBE = [re.compile(sign) for sign in (rb"\xc3[\x82-\xb0][\xc2-\xe2]", rb"\xc2[\x80-\x9f]")]
_SIGNS = ("\ufffd", "锟斤拷")

_STOP = 261
r"""World's "\n\n", at which llama.cpp ends an RWKV model's answer."""

_SHOWN = 20
"""Characters of a text that a message shows."""


def lint(text: str, tokenizer: Tokenizer) -> list[Finding]:
    """The faults of a text, in their order; of each kind the first.

    Those of turns are looked for in a text that begins with one.

    Args:
        text: as it is learned, `dialogue.Text.text`.
        tokenizer: the model's.
    """
    found = list[Finding]()

    def find(code: Code, at: int, remedy: str) -> None:
        if all(finding.code != code for finding in found):
            found.append(Finding(code, at, f"{text[max(at - 3, 0) : at + _SHOWN]!r}: {remedy}"))

    if "\r" in text:
        find(Code.CARRIAGE_RETURN, text.index("\r"), r"write line ends as \n")
    if "<|endoftext|>" in text:
        find(Code.END_TEXT, text.index("<|endoftext|>"), "take it out: each row ends a document")
    said = turns(text)
    data = text.encode("utf-8", errors="surrogateescape")
    if len(data.translate(None, _CONTROLS)) < len(data) and (control := _CONTROL.search(text)):
        find(Code.CONTROL, control.start(), "take the control character out")
    if len(data) > len(text):
        maybe = any(sign in text for sign in _SIGNS) or any(sign.search(data) for sign in _MAYBE)
        if maybe and (misread := _MOJIBAKE.search(text)):
            find(Code.MOJIBAKE, misread.start(), "read the source by the encoding it was written in")
        if "：" in text and (wide := WIDE_COLON.search(text)):
            at = wide.start() + wide[0].startswith("\n")
            find(Code.FULL_WIDTH_COLON, at, 'write ":" and one blank after the role')
            said = ()  # which turns there are can't be told
    if begins_with_a_turn(text, said):
        _lint_turns(text, said, tokenizer, find)
    return sorted(found, key=lambda finding: finding.at)


def _lint_turns(text: str, said: Sequence[Turn], tokenizer: Tokenizer, find: Callable[[Code, int, str], None]) -> None:
    swallowed = _swallowed(tokenizer)
    for turn in said:
        at, begin, end = turn.at, turn.begin, turn.end
        content = text[begin:end]
        if not content or content.isspace():
            if turn.answers:
                find(Code.EMPTY_ANSWER, at, "answer, or drop the turn")
            continue
        if content[0] != " " or content[1].isspace():
            find(Code.COLON_BLANK, begin - 1, "write one blank after the colon")
        if _DOUBLED.match(content):
            find(Code.DOUBLED_ROLE, at, "write the role once")
        if "\n" in content and (blank := _BLANK_LINE.search(content.rstrip())):
            find(Code.BLANK_LINE, begin + blank.start(), 'make it one line end, as blank_lines = "collapse" does')
        if turn.answers and "<think" in content and "</think>" not in content:
            find(Code.UNCLOSED_THOUGHT, begin + content.index("<think"), "write </think> where the thought ends")
        if (
            turn.answers
            and turn.stop < len(text)
            and swallowed is not None
            and not _reachable(text, turn, tokenizer, swallowed)
        ):
            find(
                Code.UNREACHABLE_STOP,
                end - 1,
                "clients that stop at the token of the blank line won't; stop at its text",
            )
    if not said[-1].answers:
        find(Code.MISSING_ANSWER, said[-1].at, "add the answer, or drop the turn")


@functools.lru_cache(maxsize=4)
def _swallowed(tokenizer: Tokenizer) -> Mapping[str, frozenset[str] | None] | None:
    """The characters that some token has right before a line end; None: these are not World's tokens.

    For each the characters that some token has right before it; None where it makes no token with the line end alone.
    """
    if len(tokenizer.table) <= _STOP or tokenizer.table[_STOP] != b"\n\n":
        return None
    entries = {entry.decode("utf-8", errors="replace") for entry in tokenizer.table if len(entry) > 1}
    last = {a for entry in entries for a, b in itertools.pairwise(entry) if b == "\n"}
    pairs = {(a, b) for entry in entries for a, b in itertools.pairwise(entry) if b in last}
    return {b: frozenset(a for a, c in pairs if c == b) if f"{b}\n" in entries else None for b in last}


def _reachable(text: str, turn: Turn, tokenizer: Tokenizer, swallowed: Mapping[str, frozenset[str] | None]) -> bool:
    r"""Whether the blank line after the turn is the token "\n\n", or would be but for carriage returns."""
    end = turn.end
    if "\r" in text[end - 1 : turn.stop]:
        return True  # a fault of its own
    if turn.stop - end != 2:  # "\n\n\n", or blanks between
        return False
    if text[end - 1] not in swallowed:
        return True
    before = swallowed[text[end - 1]]
    if before is not None and text[end - 2] not in before:
        return False  # a token begins with the last character, for none has both; and the longest has the line end too
    at = len(text[:end].encode("utf-8", errors="surrogateescape"))
    for token in tokenizer.encode(text):
        if at <= 0:
            return at == 0 and token == _STOP
        at -= len(tokenizer.table[token])
    return False
