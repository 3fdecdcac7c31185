"""Questions with choices: whether a model finds the right one likeliest.

Source: acc and acc_norm of EleutherAI/lm-evaluation-harness, lm_eval/api/task.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rwkv_core.evaluation.likelihood import Reader, likelihoods
from rwkv_core.evaluation.measure import Array


class Choice(NamedTuple):
    """A question, and the answers to choose from."""

    context: str
    """All that stands before the answer."""
    choices: tuple[str, ...]
    """Without what stands before them."""
    right: int
    """Which of them."""
    delimiter: str = " "
    """Between the context and each choice."""


class Chosen(NamedTuple):
    """1 where the right choice is the likeliest, else 0. (Q,) each."""

    acc: Array
    """By probability, which favours short ones."""
    acc_norm: Array
    """By the logarithm of the probability divided by the number of characters."""


def choose(reader: Reader, asked: Sequence[Choice]) -> Chosen:
    """Which choices a model finds likeliest; of equal ones the first counts. A question is read once for all its choices."""
    pairs = [
        reader.pair(question.context, question.delimiter + choice) for question in asked for choice in question.choices
    ]
    found = likelihoods(reader, pairs)
    acc, acc_norm, at = np.zeros(len(asked)), np.zeros(len(asked)), 0
    for i, question in enumerate(asked):
        nats = found.nats[at : at + len(question.choices)]
        at += len(question.choices)
        acc[i] = nats.argmin() == question.right
        acc_norm[i] = (nats / [len(choice) for choice in question.choices]).argmin() == question.right
    return Chosen(acc, acc_norm)
