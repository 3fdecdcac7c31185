"""A row's fields become the text that a model reads, and which of its characters are learned.

The text is as RWKV World models were trained and as clients send it: "User: ...", "Assistant: ...", one blank after the colon,
a blank line between turns. A prompt ends at "Assistant:", so an answer is what follows the colon, its blank included, up to the
next turn: the blank line that ends it is the model's to write.
"""

import contextlib
import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rwkv_core.config import Column, PartConfig
from rwkv_core.data.source import Empty, Unusable

Spans = tuple[tuple[int, int], ...]
"""Stretches of a text, each from a character to before another; ascending, none touching the next."""

_ASK, _ANSWER = ("User", "Human"), ("Assistant", "Bot", "AI")
_FAMILIES = (  # who asks, who answers; a text has roles of one family, and of System
    (_ASK, _ANSWER),
    (("Instruction", "Input"), ("Response",)),
    (("Question",), ("Answer",)),
    (("Q",), ("A",)),
)

ASKING = {role: asking for asking, answering in _FAMILIES for role in asking + answering}
"""The roles that ask in a text, by any role of its family: one of them behind a blank line ends an answer."""

TURN = "\n\nUser:"
"""What ends an answer in a chat, beside token 0: the user's next turn begins."""

ROLES = ("System", *(word for family in _FAMILIES for words in family for word in words))
"""The words that begin a turn. "A" is one only in a text whose first role is "Q": novels have lines that begin with "A:"."""

WIDE_COLON = re.compile(rf"(?:\A|\n)(?:{'|'.join(role for role in ROLES if len(role) > 2)})：")
"""A role with a full-width colon, as in Chinese text: no client takes it for one. "Q：" and "A：" are usual in articles."""

_FORMS: tuple[tuple[Column, ...], ...] = (
    ("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion"), ("question", "answer"), ("text",),
)  # fmt: skip

_SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "System"),
    **dict.fromkeys(("user", "human"), "User"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "Assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "output"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}  # of OpenAI's messages, ShareGPT's conversations and what was made from them

# The words of G1 models for tools, from the examples of RWKV-Gradio, huggingface.co/spaces/BlinkDL/RWKV-Gradio-1.
_TOOLS, _OUTPUT = "Tools:\n", "Function output: "

_BLANK_LINE = r"\n[^\S\n]*\n"
_FIRST = re.compile(rf"{_BLANK_LINE}({'|'.join(role for role in ROLES if role not in ('System', 'A'))}):")
_LINE_WITH_A_ROLE = re.compile(rf"\n(?=(?:{'|'.join(ROLES)}):)")
_BLANK_LINES = re.compile(r"\n\s*\n")
_THOUGHT = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)


class Text(NamedTuple):
    """What is learned from a row."""

    text: str
    learned: Spans | None
    """The characters that are learned; None: all."""
    weight: float
    """What each of them counts."""


class Turn(NamedTuple):
    """A turn in a text."""

    role: str
    answers: bool
    at: int
    """Where its role begins."""
    begin: int
    """Behind the colon."""
    end: int
    """Where the blank line after it begins; blanks may stand before."""
    stop: int
    """Where the next role begins, or the text ends."""


class _Said(NamedTuple):
    """A turn to be put into a text."""

    role: str
    content: str
    learned: bool = True


def read(fields: Mapping[str, Any], part: PartConfig) -> Text:
    """The text of a row, and what of it is learned.

    Args:
        fields: of the row: `text`, `messages`, `conversations`, `instruction` and `output` (and `input`), `prompt` and
            `completion`, or `question` and `answer`, the first of these forms, text last, that is whole; `system`, `tools` and
            `weight` beside. Other fields are passed over.
        part: what the columns are called, and what becomes of blank lines and thoughts.

    Raises:
        Unusable: the fields make no text, or nothing of it would be learned; the message says why.
    """
    row = _Row(fields, part.columns)
    weight = part.weight * _weight(row.get("weight"))
    form = _form(row, part)
    silent: Spans = ()
    if form == ("text",):
        text = _kept(_string(row.get("text"), row.named("text")), part)
    else:
        text, silent = _formatted(_turns_of(row, form), part)
    if not text.strip():
        raise Empty("the text is empty: nothing can be learned from it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(
            f"\\u{ord(text[error.start]):04x} at character {error.start + 1}: half of a surrogate pair is no character"
        ) from None
    learned = spans(text, part)
    if silent:
        learned = _without(((0, len(text)),) if learned is None else learned, silent)
    if learned == ():
        raise Unusable(f"{text[:40]!r}...: has nothing that mask = {part.mask} would learn")
    return Text(text, learned, weight)


def spans(text: str, part: PartConfig) -> Spans | None:
    """What the part's mask learns of a text: () is nothing, None all.

    qa: what follows the colon of each answer that says something, to the next turn or the end. se: what follows the mark that
    begins, to the end of the mark that stops; a model is given the first and has to write the second. RWKV-PEFT differs: it
    learns "Assistant:" itself and the mark that begins, not the mark that stops, and a text without any answer whole.
    """
    if part.marks is not None:
        return _marked(text, *part.marks)
    if part.mask == "qa":
        return tuple((turn.begin, turn.stop) for turn in turns(text) if turn.answers and _says(text, turn))
    return None


@functools.lru_cache(maxsize=4)  # reading, masking and the lints each ask for those of one text
def turns(text: str) -> tuple[Turn, ...]:
    """The turns in a text: each begins with a role and its colon, at the text's beginning or behind a blank line.

    The first role that asks or answers says which others there are: what follows "Input:" in a chat is part of a turn.
    """
    padded = "\n\n" + text  # so the beginning is behind a blank line as well
    first = _FIRST.search(padded)
    if first is None:
        return ()
    pattern, answering = _family(first[1])
    found, end, stop = list[Turn](), len(text), len(text)
    for match in reversed(list(pattern.finditer(padded))):
        role, at = match[1], match.start(1) - 2
        found.append(Turn(role, role in answering, at, match.end() - 2, end, stop))
        end, stop = match.start() - 2, at
    return tuple(reversed(found))


def begins_with_a_turn(text: str, found: Sequence[Turn]) -> bool:
    """Whether the text is a conversation from its beginning on, blanks aside; `found`: its turns."""
    return bool(found) and not text[: found[0].at].strip()


def one_turn(text: str) -> str:
    """Text as a turn has it: Unix line ends, no blank lines, no blanks around it."""
    return _BLANK_LINES.sub("\n", _unix(text)).strip()


def said(messages: Any) -> list[tuple[str, str]]:
    """Role and content of each of OpenAI's messages, as the turns of a row that has them.

    Raises:
        Unusable: they are no messages; the text says which, and why.
    """
    return [(message.role, message.content) for message in _messages(messages, "messages")]


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


@functools.cache
def _family(role: str) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """What finds the turns in a text whose first role is this, and the roles that answer in it."""
    asking, answering = next(family for family in _FAMILIES if role in family[0] + family[1])
    return re.compile(rf"{_BLANK_LINE}({'|'.join(('System', *asking, *answering))}):"), answering


def _says(text: str, turn: Turn) -> bool:
    return not text[turn.begin : turn.end].isspace() and turn.begin < turn.end


@functools.cache
def _marks(stop: str, begin: str) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted((stop, begin), key=len, reverse=True))))  # the longer one first


def _marked(text: str, stop: str, begin: str) -> Spans:
    found: list[tuple[int, int]] = []
    start: int | None = None
    for match in _marks(stop, begin).finditer(text):
        if match[0] == begin:
            if start is not None:
                found.append((start, match.start()))
            start = match.end()
        elif start is not None:
            found.append((start, match.end()))
            start = None
    if start is not None:
        found.append((start, len(text)))
    return tuple((a, b) for a, b in found if a < b)


def _without(all_of: Spans, silent: Spans) -> Spans:
    """What is in `all_of` and not in `silent`."""
    steps = sorted(
        step for some, sign in ((all_of, 1), (silent, -1)) for a, b in some for step in ((a, sign), (b, -sign))
    )
    kept, depth, start = list[tuple[int, int]](), 0, 0  # depth: 1 in all_of alone, else less
    for point, here in itertools.groupby(steps, key=lambda step: step[0]):
        before, depth = depth, depth + sum(sign for _, sign in here)
        if before == 1 != depth:
            kept.append((start, point))
        elif before != 1 == depth:
            start = point
    return tuple(kept)


# Fields


class _Row:
    """The fields of a row by their known names."""

    def __init__(self, fields: Mapping[str, Any], columns: Mapping[Column, str]) -> None:
        self._fields, self._columns = fields, columns
        for known, name in columns.items():
            if name not in fields:
                raise Unusable(f"{self}: there is no {name!r}, which columns says is the {known}")

    def __str__(self) -> str:
        return f"fields {', '.join(map(repr, itertools.islice(self._fields, 12))) or 'none'}"

    def get(self, known: Column) -> Any:
        return self._fields.get(self.named(known) if self._columns else known)

    def has(self, form: Sequence[Column]) -> bool:
        """Whether none of them is null. A loop, for `all` of a generator takes three times as long, and each row asks."""
        for known in form:  # noqa: SIM110
            if self.get(known) is None:
                return False
        return True

    def named(self, known: Column) -> str:
        return self._columns.get(known, known)


def _form(row: _Row, part: PartConfig) -> tuple[Column, ...]:
    """The first form whose fields the row has; where columns names some of a form's, that form."""
    named = [form for form in _FORMS if any(known in part.columns for known in form)] if part.columns else ()
    for form in named or _FORMS:
        if row.has(form):
            return form
    known = "; ".join(" and ".join(form) for form in _FORMS)
    raise Unusable(f"{row}: a row has {known}, none of them null, or columns says what these are called")


def _weight(value: Any) -> float:
    if value is None:
        return 1
    number = math.nan
    if isinstance(value, str | int | float) and not isinstance(value, bool):  # CSV files have texts alone
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not 0 < number < math.inf:
        raise Unusable(f"weight = {str(value)[:40]!r}: must be a number above 0")
    return number


def _string(value: Any, name: str) -> str:
    """A text, or OpenAI's list of pieces of it."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes) and value:
        pieces = []
        for piece in value:
            if not isinstance(piece, Mapping) or not isinstance(piece.get("text"), str):
                kind = piece.get("type") if isinstance(piece, Mapping) else type(piece).__name__
                raise Unusable(f"{name}: has a piece that is {kind}; only texts can be learned")
            pieces.append(piece["text"])
        return "\n".join(pieces)
    raise Unusable(f"{name} is {'null' if value is None else type(value).__name__}: must be a text")


def _turns_of(row: _Row, form: tuple[Column, ...]) -> list[_Said]:
    said: list[_Said] = []
    system = _string(row.get("system") or "", row.named("system"))
    match form:
        case ("messages",) | ("conversations",):
            said = _messages(row.get(form[0]), row.named(form[0]))
        case ("prompt", "completion") if not isinstance(row.get("prompt"), str):  # messages, in two parts
            said = _messages(row.get("prompt"), row.named("prompt"))
            said += _messages(row.get("completion"), row.named("completion"))
        case ("instruction", "output"):
            said = [_Said("Instruction", _string(row.get("instruction"), row.named("instruction")))]
            given = _string(row.get("input") or "", row.named("input"))
            said += [_Said("Input", given)] if given.strip() else []
            said += [_Said("Response", _string(row.get("output"), row.named("output")))]
        case _:  # as a chat, for it is a chat that will ask
            said = [
                _Said(role, _string(row.get(known), row.named(known)))
                for role, known in zip(("User", "Assistant"), form, strict=True)
            ]
    tools = row.get("tools")
    if tools and tools != "[]":
        system = f"{system}\n{_TOOLS}{tools if isinstance(tools, str) else _json(tools)}"
    if system.strip():
        if said and said[0].role == "System":
            system = f"{said.pop(0).content}\n{system}"
        said.insert(0, _Said("System", system))
    return said


def _messages(messages: Any, name: str) -> list[_Said]:
    """The turns in OpenAI's messages or ShareGPT's conversations."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise Unusable(f"{name}: must be a list of messages")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, name: str) -> _Said:
    if not isinstance(message, Mapping):
        raise Unusable(f"{name} is {type(message).__name__}: must have a role and a content")
    speaker = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise Unusable(f"{name}: {speaker!r} is no role; known are {', '.join(_SPEAKERS)}")
    calls: Any = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if not isinstance(calls, Sequence):
        raise Unusable(f"{name}.tool_calls is {type(calls).__name__}: must be a list")
    value = next((message[key] for key in ("content", "value") if message.get(key) is not None), None)
    content = "" if value is None and calls else _string("" if value == [] else value, f"{name}.content")
    thought = next((message[key] for key in ("reasoning_content", "thinking") if message.get(key)), None)
    if thought is not None and role == "Assistant" and not content.lstrip().startswith("<think>"):
        content = f"<think>{_string(thought, f'{name}.thinking').strip()}</think>\n{content.lstrip()}"
    if calls:
        content = f"{content}\n{_block([_call(call, name) for call in calls])}"
    match role:
        case "output":
            role, content = "User", f"{_OUTPUT}{content.strip()}"
        case "call":
            role, content = "Assistant", f"```json\n{content.strip()}\n```"
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise Unusable(f"{name}.weight = {weight!r}: must be 0, for a message that is not learned, or 1")
    return _Said(role, content, weight is None or bool(weight))


def _call(call: Any, name: str) -> dict[str, Any]:
    """Name and arguments of a call of a tool, whose arguments OpenAI has as a string of JSON."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable(f"{name}: has a call of a tool without a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise Unusable(f"{name}: calls {function['name']} with arguments that are no JSON") from None
    return {"name": function["name"], "arguments": arguments}


def _block(calls: list[dict[str, Any]]) -> str:
    return f"```json\n{_json(calls[0] if len(calls) == 1 else calls)}\n```"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


# Text


def _formatted(said: Iterable[_Said], part: PartConfig) -> tuple[str, Spans]:
    """The text of turns, and the stretches of those that are not learned."""
    pieces, silent, length = list[str](), list[tuple[int, int]](), 0
    for turn in said:
        content = _clean(turn.content, part)
        if turn.role == "Assistant":
            content = _thoughts(content, part)
        piece = f"{turn.role}: {content}" if content else f"{turn.role}:"
        pieces.append(piece)
        if not turn.learned:
            silent.append((length + len(turn.role) + 1, length + len(piece) + 2))
        length += len(piece) + 2
    text = "\n\n".join(pieces)
    return text, tuple((start, min(stop, len(text))) for start, stop in silent)


def _kept(text: str, part: PartConfig) -> str:
    """A text as it is; where it begins with a turn, what the policies say of blank lines and thoughts is done in its turns."""
    found = turns(text)
    if not begins_with_a_turn(text, found) or not any(turn.answers for turn in found):
        return text
    pieces, at = [], 0
    for turn in found:
        given = text[turn.begin : turn.end]
        content = given.strip()
        collapses = part.blank_lines == "collapse" and "\n" in content
        changed = _BLANK_LINES.sub("\n", content) if collapses else content
        if turn.role == "Assistant":
            changed = _thoughts(changed, part)
        if changed != content:
            before = given[: len(given) - len(given.lstrip())]
            pieces += [text[at : turn.begin], before, changed]
            at = turn.begin + len(before) + len(content)
    return "".join([*pieces, text[at:]])


def _clean(text: str, part: PartConfig) -> str:
    """What is said in a turn; where blank lines are kept, all but those that would begin another turn."""
    if part.blank_lines == "collapse":
        return one_turn(text)
    text = _unix(text).strip()
    pieces, at = list[str](), 0
    for match in _LINE_WITH_A_ROLE.finditer(text):
        before = text[at : match.start()]
        said = before.rstrip()
        pieces.append(said if "\n" in before[len(said) :] else before)
        at = match.start()
    return "".join([*pieces, text[at:]])


def _thoughts(answer: str, part: PartConfig) -> str:
    """The answer with the thoughts before it that the part wants.

    Source: the model cards of RWKV7-G1, huggingface.co/BlinkDL/rwkv7-g1.
    """
    match part.think:
        case "empty" if answer and not answer.startswith("<think"):
            return f"<think></think>\n{answer}"
        case "remove" if thought := _THOUGHT.match(answer):
            return answer[thought.end() :]
        case _:
            return answer
