"""The checks alone: each says no where it must, and yes where it may."""

import numpy as np
import pytest
from data_settings import ROOT
from documents import scores_of

from rwkv_core.evaluation.subject import Said
from rwkv_core.gate import TURN, answers, finite, kept, lower
from rwkv_core.generation.text import Output
from tasks.params import load

SETTINGS = load(ROOT / "params.yaml").evaluate


def scores(change=0.0, documents=60, noise=0.0):
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 200, documents).astype(float)
    losses = rng.normal(3, 1, documents).clip(0.5) + change + noise * rng.normal(size=documents)
    return scores_of(losses * tokens, tokens, 4 * tokens)


def is_lower(after, margin=0.0):
    return lower("base", scores(documents=len(after.nats)), after, margin, SETTINGS, 0)


def test_an_identical_model_is_not_lower():
    check = is_lower(scores())
    assert not check.passed
    assert "+0.0000 (95% interval +0.0000 to +0.0000)" in check.found


@pytest.mark.parametrize(("change", "margin", "passed"), [
    (-0.2, 0.0, True), (-0.2, 0.1, True), (-0.2, 0.2, False), (-0.2, 0.3, False), (0.2, 0.0, False)])  # fmt: skip
def test_lower_by_more_than_the_margin(change, margin, passed):
    assert is_lower(scores(change), margin).passed == passed


def test_it_is_the_interval_that_counts():
    """The mean is below the margin, and the interval is not."""
    check = is_lower(scores(-0.1, noise=1.0))
    assert "-0." in check.found
    assert not check.passed


def test_few_documents_tell_nothing():
    assert is_lower(scores(-1.0, documents=10)).passed
    assert not is_lower(scores(-1.0, documents=9)).passed
    none = scores(-1.0)
    check = lower("base", none.without(np.ones(60, bool)), none, 0.0, SETTINGS, 0)
    assert not check.passed
    assert "none has a token" in check.found


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_no_number_passes_nothing(value):
    broken = scores(-1.0)
    broken.nats[7] = value
    assert not is_lower(broken).passed
    assert not kept("base", scores(), broken, 10.0, SETTINGS, 0).passed
    check = finite([scores(), broken])
    assert not check.passed
    assert check.found.startswith("1 of 120 ")
    assert finite([scores()]).passed


@pytest.mark.parametrize(("change", "margin", "passed"), [
    (0.0, 0.0, True), (0.05, 0.1, True), (0.2, 0.1, False), (-1.0, 0.0, True)])  # fmt: skip
def test_general_text_may_lose_as_much_as_the_margin(change, margin, passed):
    assert kept("champion", scores(), scores(change), margin, SETTINGS, 0).passed == passed


def test_answers_end_by_themselves():
    given = [Said(" It is 3.", "end"), Said(" Four", "stop"), Said(" and and and", "length"), Said("", "end")]
    assert [check.passed for check in answers(given, 0.75)] == [True, True]
    assert [check.passed for check in answers(given, 0.76)] == [False, True]


@pytest.mark.parametrize("text", [" Three.\nUser: and", " 3\n\nAssistant: 4", " x\nSystem：y", "User: what?"])
def test_an_answer_that_begins_another_turn_is_found(text):
    ended, alone = answers([Said(text, "end"), Said(" fine; the User: field is his", "end")], 1.0)
    assert ended.passed
    assert not alone.passed
    assert alone.found.startswith("1 of 2 ")


def test_the_user_s_next_turn_ends_an_answer_and_is_not_in_it():
    output = Output((TURN,))
    assert output.push(b" Three.\n\nUser: and?") == " Three."
    assert output.stopped
