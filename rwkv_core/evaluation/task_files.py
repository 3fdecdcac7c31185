r"""Test sets in files of the user: the last words of passages, as LAMBADA has them, and questions with choices.

What the public sets' files have is known by their fields, and asked as lm-eval asks it:

    LAMBADA     text                                    the text without its last word -> the last word
    HellaSwag   activity_label, ctx_a, ctx_b, endings, label       "activity: ctx" -> each ending
    ARC         question, choices {text, label}, answerKey         "Question: ...\nAnswer:" -> each text
    ARC's own   question {stem, choices [{text, label}]}, answerKey
    MMLU        question, choices, answer, subject; or a .csv without a header: question, A, B, C, D, answer
                                                        question, "A. ..." lines, "Answer:" -> each letter
    any other   question, choices, and one of answer, gold, label, answerKey     as ARC
                query, choices, and one of these                   the query as it is -> each choice

Source: EleutherAI/lm-evaluation-harness, lm_eval/tasks: lambada, hellaswag, arc, mmlu.
"""

import csv
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_core.data import readers
from rwkv_core.data.readers import Row
from rwkv_core.errors import InputError
from rwkv_core.evaluation.choices import Choice, choose
from rwkv_core.evaluation.likelihood import Reader, likelihoods
from rwkv_core.evaluation.measure import Items

_ANSWERS = ("answer", "gold", "label", "answerKey")
_MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
_BRACKETS = re.compile(r"\[.*?\]")
_REMEDY = "see docs/evaluation.md for what a row must have"


class Passage(NamedTuple):
    """A text whose last word is asked for."""

    context: str
    word: str


def read(path: Path) -> Sequence[Passage] | Sequence[Choice]:
    """The questions in a .jsonl, .json, .csv, .tsv or .parquet file, all of one kind.

    Raises:
        InputError: there is no such file, it can't be read, or it has no rows; or a row is of no known form, or of another kind
            than those before it. The error names its line.
        WorldError: it can't be read for a reason outside of it.
    """
    if not path.is_file():
        raise InputError(str(path), "no file of questions is there", "correct evaluate.tasks")
    found: list[Passage | Choice] = []
    for where, fields in _rows(path):
        try:
            asked = _asked(fields)
        except ValueError as error:
            raise InputError(where, str(error), _REMEDY) from None
        if found and type(asked) is not type(found[0]):
            raise InputError(
                where,
                "is of another kind than the rows before it",
                "put passages and questions into files of their own",
            )
        found.append(asked)
    if not found:
        raise InputError(str(path), "has no rows", _REMEDY)
    return found  # type: ignore[return-value]  # all are of one kind


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    name = str(path)
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            rows = readers.jsonl(path, name, "", 0, path.stat().st_size, 1)
        case ".json":
            rows = readers.array(path, name, "")
        case ".csv" | ".tsv":
            if _is_mmlu(path):
                yield from _mmlu(path)
                return
            rows = readers.table(path, name, "")
        case ".parquet":
            rows = readers.parquet(path, name, 0, len(readers.parquet_sizes(path, name)[0]), 1)
        case ending:
            raise InputError(
                f"{path}: {ending or 'no ending'}", "read are .jsonl, .json, .csv, .tsv, .parquet", "rename it"
            )
    for row in rows:
        if not isinstance(row, Row):
            raise InputError(row.where, row.reason, "correct the row")
        yield row.where, row.fields


def _is_mmlu(path: Path) -> bool:
    """Whether it begins with a question of MMLU's, not with a header."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        first = next(csv.reader(file), [])
    return len(first) == len(_MMLU_COLUMNS) and first[-1].strip() in ("A", "B", "C", "D")


def _mmlu(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with readers.reading(str(path), "CSV"), path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.reader(file)
        line = 1
        for cells in table:
            where, line = f"{path}:{line}", table.line_num + 1
            if not cells:
                continue
            if len(cells) != len(_MMLU_COLUMNS):
                raise InputError(
                    where, f"{len(cells)} columns: MMLU's are {', '.join(_MMLU_COLUMNS)}", "correct the row"
                )
            question, *choices, answer = cells
            yield where, {"question": question, "choices": choices, "answer": answer, "subject": path.stem}


def _asked(fields: Mapping[str, Any]) -> Passage | Choice:
    """What a row asks.

    Raises:
        ValueError: its fields are of no known form; the message says what is wrong.
    """
    if "endings" in fields:
        return _hellaswag(fields)
    question = fields.get("question", fields.get("query"))
    if isinstance(question, Mapping):  # ARC's own files
        fields = {**fields, "choices": question.get("choices")}
        question = question.get("stem")
    if "choices" in fields and question is not None:
        return _choice(fields, _text(question, "question"))
    if "text" in fields:
        return _passage(_text(fields["text"], "text"))
    raise ValueError(f"fields {', '.join(map(repr, fields)) or 'none'}: are of no known form")


def _passage(text: str) -> Passage:
    context, _, word = text.rpartition(" ")
    if not context.strip() or not word:
        raise ValueError(f"{text[:40]!r}: must have a last word, with a blank and other words before it")
    return Passage(context, word)


def _choice(fields: Mapping[str, Any], question: str) -> Choice:
    texts, labels = _listed(fields["choices"])
    right = _right(fields, texts, labels)
    if "query" in fields:
        return Choice(question, texts, right)
    if "subject" in fields:
        listed = "".join(f"{letter}. {text}\n" for letter, text in zip(string.ascii_uppercase, texts, strict=False))
        return Choice(f"{question.strip()}\n{listed}Answer:", tuple(string.ascii_uppercase[: len(texts)]), right)
    return Choice(f"Question: {question}\nAnswer:", texts, right)


def _hellaswag(fields: Mapping[str, Any]) -> Choice:
    endings, labels = _listed(fields["endings"])
    if {"ctx_a", "ctx_b", "activity_label"} <= fields.keys():
        a, b, activity = (_text(fields[name], name, empty=True) for name in ("ctx_a", "ctx_b", "activity_label"))
        query = f"{activity}: {a} {b.capitalize()}"
    else:
        query = _text(fields.get("ctx"), "ctx")
    return Choice(_plain(query), tuple(map(_plain, endings)), _right(fields, endings, labels))


def _plain(text: str) -> str:
    """Without the marks that WikiHow's part of HellaSwag has."""
    return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _listed(choices: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts of the choices, and their labels: letters where there are none."""
    if isinstance(choices, Mapping):
        texts, labels = choices.get("text"), choices.get("label")
    elif isinstance(choices, Sequence) and choices and all(isinstance(one, Mapping) for one in choices):
        texts, labels = ([one.get(name) for one in choices] for name in ("text", "label"))
    else:
        texts, labels = choices, None
    if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) < 2:
        raise ValueError("choices: must be a list of two texts or more")
    if labels is not None and (not isinstance(labels, Sequence) or len(labels) != len(texts)):
        raise ValueError("choices: must have a label for each text")
    return tuple(_text(text, "choices") for text in texts), tuple(
        map(str, labels or string.ascii_uppercase[: len(texts)])
    )


def _right(fields: Mapping[str, Any], texts: tuple[str, ...], labels: tuple[str, ...]) -> int:
    """Which choice is right: told by its number from 0 on, by its label, or by its text."""
    name = next((name for name in _ANSWERS if fields.get(name) is not None), None)
    if name is None:
        raise ValueError(f"has none of {', '.join(_ANSWERS)}: one must say which choice is right")
    told = fields[name]
    if isinstance(told, str) and not isinstance(told, bool):
        said = told.strip()
        for known in (labels, texts, [str(i) for i in range(len(texts))]):
            if said in known:
                return list(known).index(said)
    elif isinstance(told, int) and not isinstance(told, bool) and 0 <= told < len(texts):
        return told
    raise ValueError(f"{name} = {told!r}: must be the number of a choice from 0 on, its label, or its text")


def _text(value: Any, name: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{name} = {value!r}: must be a text")
    return value


def measure(reader: Reader, asked: Sequence[Passage] | Sequence[Choice]) -> dict[str, Items]:
    """What a model makes of a file's questions.

    Returns:
        Of passages: acc, whether greedy decoding writes the last word, and log_perplexity, nats of the last word: e to the mean
        of them is its perplexity. Of questions: acc and acc_norm, see `choices.Chosen`.
    """
    ones = np.ones(len(asked))
    passages = [one for one in asked if isinstance(one, Passage)]
    if passages:
        found = likelihoods(reader, [reader.pair(one.context, f" {one.word}") for one in passages])
        return {
            "acc": Items(found.greedy.astype(float), ones, higher_is_better=True),
            "log_perplexity": Items(found.nats, ones, higher_is_better=False),
        }
    chosen = choose(reader, [one for one in asked if isinstance(one, Choice)])
    return {name: Items(values, ones, higher_is_better=True) for name, values in chosen._asdict().items()}
