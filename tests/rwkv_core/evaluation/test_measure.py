"""The bootstrap: against draws that are all enumerated, and whether its intervals hold what they say."""

import itertools
import math
import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest

from rwkv_core.errors import InputError
from rwkv_core.evaluation import measure
from rwkv_core.evaluation.measure import FEWEST, Items, change, changes

LENGTHS = np.exp(np.random.default_rng(7).normal(5, 0.8, 2000)).clip(5).round()
"""Tokens of the documents of which others are drawn: half of them have 90 to 250, the longest some thousands."""

TRUTH = -0.04
"""What tuning changes in all of them together, in nats a token."""


def losses(rng, documents):
    """A base, and a tuned model that is better at long documents, and at each by another amount, which is lopsided."""
    tokens = rng.choice(LENGTHS, documents)
    middle = (LENGTHS * np.log(LENGTHS)).sum() / LENGTHS.sum()
    base = rng.normal(3, 0.7, documents).clip(0.5)
    each = 0.09 - rng.gamma(3.0, 0.03, documents)
    after = base + TRUTH - 0.02 * (np.log(tokens) - middle) + each + 0.6 * rng.normal(size=documents) / np.sqrt(tokens)
    return Items(base * tokens, tokens, False), Items(after * tokens, tokens, False), TRUTH


def answers(rng, questions):
    """Right or wrong: of three in ten that the tuned model answers anew, seven are right, where five of the base's were."""
    base = rng.random(questions) < 0.5
    tuned = np.where(rng.random(questions) < 0.3, rng.random(questions) < 0.7, base)
    one = np.ones(questions)
    return Items(base.astype(float), one, True), Items(tuned.astype(float), one, True), 0.06


def coverage(made, items, truths=1000):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(truths):
        base, tuned, truth = made(rng, items)
        found = change(base, tuned, resamples=400, confidence=0.95, seed=1)["change"]
        inside += found["low"] <= truth <= found["high"]
    return inside / truths


@pytest.mark.parametrize(
    ("made", "items"), [(losses, 20), (losses, 40), (losses, 100), (losses, 250), (answers, 60), (answers, 150)]
)
def test_a_95_percent_interval_covers_the_truth(made, items):
    assert 0.93 <= coverage(made, items) <= 0.97


def test_plain_percentiles_would_not(monkeypatch):
    monkeypatch.setattr(measure, "_reach", lambda influences, weights, confidence: NormalDist().inv_cdf(0.975))
    assert coverage(losses, 12) < 0.9
    assert coverage(losses, 20) < 0.92


def test_the_interval_is_of_all_draws_there_are(monkeypatch):
    """Of three items there are 27 draws: percentiles of many random ones are those of these."""
    monkeypatch.setattr(measure, "_reach", lambda influences, weights, confidence: -NormalDist().inv_cdf(0.1))
    before, after, weight = np.array([6.0, 2.0, 9.0]), np.array([5.0, 2.5, 4.0]), np.array([3.0, 1.0, 4.0])
    all_draws = [
        (after[list(i)].sum() - before[list(i)].sum()) / weight[list(i)].sum()
        for i in itertools.product(range(3), repeat=3)
    ]
    found = change(Items(before, weight, False), Items(after, weight, False), resamples=50_000, confidence=0.8, seed=0)
    assert found["base"] == 17 / 8
    assert found["tuned"] == 11.5 / 8
    assert found["change"]["value"] == pytest.approx(-5.5 / 8)
    low, high = np.quantile(all_draws, [0.1, 0.9], method="inverted_cdf")
    assert (found["change"]["low"], found["change"]["high"]) == pytest.approx((low, high), rel=1e-9)


def test_what_is_made_of_a_mean_is_compared():
    base, tuned, _ = losses(np.random.default_rng(3), 50)
    settings = {"resamples": 500, "confidence": 0.9, "seed": 2}
    plain, exponential = change(base, tuned, **settings), change(base, tuned, **settings, form=np.exp)
    assert exponential["base"] == math.exp(plain["base"])
    assert exponential["change"]["value"] == pytest.approx(math.exp(plain["tuned"]) - math.exp(plain["base"]))
    ratio = exponential["change"]["low"] / plain["change"]["low"]
    assert ratio == pytest.approx(math.exp(plain["base"]), rel=0.3)


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.7062), (2, 4.30265), (9, 2.26216), (30, 2.04227), (1e6, 1.95996)])
def test_students_t_is_that_of_the_tables(freedom, t):
    assert measure._students_t(0.95, freedom) == pytest.approx(t, rel=1e-5)


def test_draws_do_not_depend_on_how_many_are_in_memory(monkeypatch):
    base, tuned, _ = losses(np.random.default_rng(5), 40)
    whole = change(base, tuned, resamples=300, confidence=0.95, seed=0)
    monkeypatch.setattr(measure, "_AT_ONCE", 170)
    parts = change(base, tuned, resamples=300, confidence=0.95, seed=0)
    assert parts["change"] == pytest.approx(whole["change"], rel=1e-12)


def test_many_items_take_bounded_memory():
    base, tuned, _ = losses(np.random.default_rng(5), 100_000)
    tracemalloc.start()
    change(base, tuned, resamples=150, confidence=0.95, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_better_is_by_what_is_measured(higher_is_better):
    before, after = (np.linspace(x, x + 1, FEWEST) for x in (1, 2))
    one = np.ones(FEWEST)
    base, tuned = Items(before, one, higher_is_better), Items(after, one, higher_is_better)
    settings = {"resamples": 200, "confidence": 0.95, "seed": 0}
    assert change(base, tuned, **settings)["better"] == (1 if higher_is_better else -1)
    assert change(tuned, base, **settings)["better"] == (-1 if higher_is_better else 1)
    few = [Items(x.total[1:], x.weight[1:], higher_is_better) for x in (base, tuned)]
    assert change(*few, **settings)["better"] == 0


def test_one_item_has_no_interval_but_its_value():
    found = change(
        *(Items(np.array([x]), np.array([2.0]), False) for x in (4.0, 3.0)), resamples=100, confidence=0.95, seed=0
    )
    assert found["change"] == {"value": -0.5, "low": -0.5, "high": -0.5}
    assert found["better"] == 0


def test_what_both_models_have_is_compared_and_nothing_else():
    here = Items(np.array([1.0, 2.0]), np.array([1.0, 1.0]), False)
    empty = Items(np.zeros(2), np.zeros(2), False)
    base = {"sources": {"a": here, "b": empty, "c": here}, "general": {"loss": here}, "answers": {"x": empty}}
    tuned = {"sources": {"a": here, "b": empty}, "answers": {"x": here}}
    found = changes(base, tuned, resamples=100, confidence=0.95, seed=0)
    assert {group: list(names) for group, names in found.items()} == {"sources": ["a"]}
    assert math.isnan(empty.mean())
    with pytest.raises(InputError, match="2 items: none has anything to measure"):
        change(empty, here, resamples=100, confidence=0.95, seed=0)
