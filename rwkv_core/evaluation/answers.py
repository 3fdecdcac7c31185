"""The questions in held-out rows: what a model answers, and how much of it is right.

Answers are compared as SQuAD does it, and those with Chinese in them as MLQA does: small letters, no punctuation, no articles;
a Chinese character is a word.

Source:
    Exact match and F1: Rajpurkar et al. 2016, "SQuAD", arXiv:1606.05250, section 6.1, and its evaluate-v1.1.py. Words of mixed
    text: Cui et al. 2019, "A Span-Extraction Dataset for Chinese Machine Reading Comprehension" (CMRC 2018), arXiv:1810.07366.
    The F1 is of bags of words for these too, as in Lewis et al. 2020, "MLQA", arXiv:1910.07475; CMRC's own is of the longest
    common run. Punctuation is Unicode's, as in MLQA.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np

from rwkv_core.data.binidx import Documents
from rwkv_core.data.dialogue import ASKING, turns
from rwkv_core.data.mask import byte_lengths
from rwkv_core.evaluation.choices import Choice, Chosen, choose
from rwkv_core.evaluation.form import FORM
from rwkv_core.evaluation.likelihood import Reader
from rwkv_core.evaluation.measure import Items
from rwkv_core.evaluation.subject import Said
from rwkv_core.generation.text import Continuation
from rwkv_core.tokenizer import Tokenizer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(
    r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\s\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
_THOUGHT_ENDS = "</think>"

_OPTION = re.compile(r"^\s*[(（]?([A-J])[)）.、:：]\s*(\S.*?)\s*$", re.MULTILINE)
"""A line of a question with a choice: "A. a cat", "(B) a dog", "C、鸟"."""


_LABELS, _TIMES = 20, 4
"""Answers that are labels: so many different ones at most, and so many questions to each on average."""


class Question(NamedTuple):
    """What a held-out document asks, and its answer."""

    document: int
    """Number of the document among the held-out ones."""
    prompt: str
    """All that stands before the answer: the turns before as they were said, and the question."""
    answer: str
    delimiter: str
    """Blanks between the prompt and the answer."""
    stop: tuple[str, ...]
    """Texts at which an answer ends, beside token 0."""
    choices: tuple[str, ...]
    """Answers in the same form, the right one among them; none where the question has no choices."""


def questions(
    documents: Documents,
    tokenizer: Tokenizer,
    count: int,
    seed: int,
    marks: Sequence[str] = (),
    left_out: Container[int] = (),
) -> list[Question]:
    """All questions of up to `count` held-out documents that have one, drawn at random.

    In a dialogue each answer that says something, and is learned, is asked for. Where there is none, the stretches that the
    mask learns are the answers; a document that is learned whole has none.

    Args:
        documents: held out.
        tokenizer: theirs.
        count: documents, at least 1.
        seed: of the draw.
        marks: texts that end a learned stretch and are not part of the answer, see `PartConfig.marks`.
        left_out: documents that are not asked about, by number.
    """
    found = list[list[Question]]()
    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    for i in (i for i in order if i not in left_out):
        if len(found) == count:
            break
        if asked := _questions_of(documents, i, tokenizer, tuple(marks)):
            found.append(asked)
    asked = sorted((question for of_one in found for question in of_one), key=lambda question: question.document)
    return _with_labels(asked)


def _questions_of(documents: Documents, i: int, tokenizer: Tokenizer, marks: tuple[str, ...]) -> list[Question]:
    tokens, learned = documents[i], documents.learned(i)
    text = tokenizer.decode(tokens.tolist())
    ends = byte_lengths(tokenizer).take(tokens).cumsum()
    found, asked = [], 0
    for turn in turns(text):
        said = text[turn.begin : turn.end].rstrip()
        last_byte = len(text[: turn.begin + len(said)].encode()) - 1
        if turn.answers and said and learned[min(int(ends.searchsorted(last_byte, side="right")), len(tokens) - 1)]:
            stop = tuple(f"\n\n{role}:" for role in ASKING[turn.role])
            found.append(_question(i, text[: turn.begin], said, stop, text[asked : turn.at]))
        asked = turn.begin
    if found or learned.all():
        return found
    edges = np.flatnonzero(np.diff(learned.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    for first, stop_at in edges.tolist():
        prompt, said = (tokenizer.decode(part.tolist()) for part in (tokens[:first], tokens[first:stop_at]))
        for mark in marks:
            said = said.removesuffix(mark)
        if prompt and said.strip():
            found.append(_question(i, prompt, said.rstrip(), marks, prompt))
    return found


def _question(document: int, prompt: str, said: str, stop: tuple[str, ...], asked: str) -> Question:
    """A question whose answer is `said`, the blanks before it included; `asked` is where its choices may be listed."""
    answer = said.strip()
    return Question(document, prompt, answer, said[: -len(answer)], stop, options(asked, answer))


def options(question: str, answer: str) -> tuple[str, ...]:
    """The choices that a question lists by letters, A first, in the form that its answer has; none where it has no such list.

    The answer may be a letter, with or without what stands around it, or a choice's text, or both.
    """
    listed = [(match[1], match[2], match[0].strip()) for match in _OPTION.finditer(question)]
    letters = [letter for letter, _, _ in listed]
    if len(listed) < 2 or letters != list(string.ascii_uppercase[: len(letters)]):
        return ()
    for form in ("{0}", "{0}.", "({0})", "{0})", "{1}", "{2}", "{0}. {1}", "({0}) {1}", "{0}) {1}", "{0}: {1}"):
        choices = tuple(form.format(*option) for option in listed)
        if answer in choices and len(set(choices)) == len(choices):
            return choices
    return ()


def _with_labels(asked: list[Question]) -> list[Question]:
    """Where few answers recur, as labels do, they are the choices of the questions that list none."""
    open_ = [question for question in asked if not question.choices]
    labels = tuple(sorted({question.answer for question in open_}))
    if not 2 <= len(labels) <= min(_LABELS, len(open_) // _TIMES):
        return asked
    return [question if question.choices else question._replace(choices=labels) for question in asked]


def words(text: str) -> list[str]:
    """The words of an answer that count."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return _WORDS.findall(_ARTICLES.sub(" ", kept))


def exact_match(given: str, right: str) -> float:
    """1 where both have the same words in the same order."""
    return float(words(given) == words(right))


def f1(given: str, right: str) -> float:
    """Harmonic mean of precision and recall of the given words, each counted as often as it stands there."""
    one, other = words(given), words(right)
    shared = sum((Counter(one) & Counter(other)).values())
    if not one or not other:
        return float(one == other)
    return 2 * shared / (len(one) + len(other))


def judge(reader: Reader, asked: Sequence[Question], max_tokens: int) -> dict[str, dict[str, Items]]:
    """What a model answers, greedily, and what it is worth.

    Args:
        reader: the model.
        asked: see `questions`.
        max_tokens: longest answer.

    Returns:
        Of "answers": exact_match, f1, and choice_acc and choice_acc_norm where questions have choices; of "format": see
        `form.FORM`. An item is a document, whatever the number of its questions.
    """
    if not asked:
        return {"answers": {}, "format": {}}
    given = dict[int, Continuation]()
    for stop in dict.fromkeys(question.stop for question in asked):
        of = [i for i, question in enumerate(asked) if question.stop == stop]
        prompts = [asked[i].prompt for i in of]
        given |= dict(zip(of, reader.answers(prompts, max_tokens=max_tokens, stop=stop), strict=True))
    answers = [given[i] for i in range(len(asked))]
    said = [answer.text.rpartition(_THOUGHT_ENDS)[2] for answer in answers]
    right = [question.answer.rpartition(_THOUGHT_ENDS)[2] for question in asked]
    measured = {
        name: _by_document(asked, [measure(*pair) for pair in zip(said, right, strict=True)])
        for name, measure in {"exact_match": exact_match, "f1": f1}.items()
    }
    with_choices = [question for question in asked if question.choices]
    if with_choices:
        rows = [Choice(q.prompt, q.choices, q.choices.index(q.answer), q.delimiter) for q in with_choices]
        found = choose(reader, rows)
        for name in Chosen._fields:
            measured[f"choice_{name}"] = _by_document(with_choices, getattr(found, name).tolist())
    form = {
        name: _by_document(asked, [float(holds(Said(a.text, a.ending))) for a in answers])
        for name, holds in FORM.items()
    }
    return {"answers": measured, "format": form}


def _by_document(asked: Sequence[Question], values: Sequence[float]) -> Items:
    """Items of the documents, in their order."""
    _, document = np.unique([question.document for question in asked], return_inverse=True)
    return Items(
        np.bincount(document, values).astype(float), np.bincount(document).astype(float), higher_is_better=True
    )
