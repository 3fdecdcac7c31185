"""May a model take another's place? Checks of its losses, its answers and its files, each with the number it was decided by."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rwkv_core.config import EvaluateConfig
from rwkv_core.errors import InputError
from rwkv_core.evaluation.held_out import Scores, compare
from rwkv_core.evaluation.measure import FEWEST
from rwkv_core.evaluation.subject import Said

TURN = "\n\nUser:"
"""What ends an answer, beside token 0: the user's next turn begins."""

_ROLE = re.compile(r"^\s*(User|Assistant|System)\s*[:：]", re.MULTILINE)


class Check(NamedTuple):
    """One thing that must hold."""

    what: str
    """What was looked at."""
    found: str
    """What was measured."""
    rule: str
    """What it must be."""
    passed: bool


def lower(other: str, before: Scores, after: Scores, margin: float, settings: EvaluateConfig, seed: int) -> Check:
    """The held-out loss is lower than another model's by more than `margin`, at the interval's upper end.

    Args:
        other: the other model's name.
        before: its scores.
        after: the candidate's, on the same tokens.
        margin: in nats a token.
        settings: draws and confidence.
        seed: of the draws.
    """
    found, high = _change(before, after, settings, seed)
    rule = f"the interval lies below {-margin:g}, and is of {FEWEST} documents or more"
    return Check(f"held-out loss against the {other}", found, rule, high < -margin)


def kept(other: str, before: Scores, after: Scores, margin: float, settings: EvaluateConfig, seed: int) -> Check:
    """The loss of general text is not above another model's by more than `margin`, at the interval's upper end; as `lower`."""
    found, high = _change(before, after, settings, seed)
    rule = f"the interval ends at {margin:g} or below, and is of {FEWEST} documents or more"
    return Check(f"general text against the {other}", found, rule, high <= margin)


def _change(before: Scores, after: Scores, settings: EvaluateConfig, seed: int) -> tuple[str, float]:
    """What the loss became, in words; and the upper end of its interval, infinite where there are too few documents."""
    if not all(np.isfinite(scores.nats).all() for scores in (before, after)):
        return "there are losses that are no numbers", np.inf
    try:
        found = compare(before, after, resamples=settings.resamples, confidence=settings.confidence, seed=seed)
    except InputError as error:
        return f"{error.value}: {error.rule}", np.inf
    loss, sides = found["change"]["loss"], (found["base"]["loss"], found["tuned"]["loss"])
    told = (
        f"{sides[0]:.4f} to {sides[1]:.4f}: {loss['value']:+.4f} ({settings.confidence:.0%} interval {loss['low']:+.4f} to "
        f"{loss['high']:+.4f}) nats a token, {found['documents']} documents"
    )
    return told, loss["high"] if found["documents"] >= FEWEST else np.inf


def finite(scores: Sequence[Scores]) -> Check:
    """Every document's loss is a number."""
    wrong = sum(int(np.count_nonzero(~np.isfinite(one.nats))) for one in scores)
    documents = sum(len(one.nats) for one in scores)
    return Check(
        "losses are numbers", f"{wrong} of {documents} documents have none", "none is NaN or infinite", not wrong
    )


def answers(given: Sequence[Said], ended: float) -> list[Check]:
    """The answers end by themselves, and speak for nobody else.

    Args:
        given: continuations of questions, with TURN as what stops them.
        ended: least share that ends.
    """
    ends = sum(answer.ending in ("end", "stop") for answer in given)
    leaks = [answer.text for answer in given if _ROLE.search(answer.text)]
    shown = f", as {' '.join(leaks[0].split())[:80]!r}" if leaks else ""
    return [
        Check("answers end", f"{ends} of {len(given)} do", f"at least {ended:.0%} do", ends / len(given) >= ended),
        Check("answers are one turn", f"{len(leaks)} of {len(given)} begin another{shown}", "none does", not leaks),
    ]
