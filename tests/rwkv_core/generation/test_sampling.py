from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.utils import PIPELINE

from rwkv_core.errors import InputError, WorldError
from rwkv_core.generation.sampling import Draws, Sampling, draw

SAMPLING = Sampling(max_tokens=10, temperature=1.0, top_p=1.0, seed=0)
PROBABILITIES = {3: 0.5, 9: 0.3, 5: 0.15, 7: 0.05}


def likely(probabilities):
    row = torch.full((64,), -30.0)
    for token, p in probabilities.items():
        row[token] = torch.tensor(p).log()
    return row


ROW = likely(PROBABILITIES)


def drawn(row=ROW, times=2000, **options):
    draws = Draws(replace(SAMPLING, **options), 0)
    return np.bincount([draws.next(row) for _ in range(times)], minlength=64)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, {3}), (0.5001, {3, 9}), (0.79, {3, 9}), (0.81, {3, 9, 5}), (0.96, {3, 9, 5, 7})]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    assert set(np.flatnonzero(drawn(top_p=top_p))) == kept


def possible(row, temperature, top_p, top_k):
    """What some random number draws; every token with a chance of 1 / 400 or more is met."""
    return {draw(row, temperature, top_p, top_k, i / 400) for i in range(400)} | {
        draw(row, temperature, top_p, top_k, 1 - 2**-53)
    }


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=8, unique=True),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 9),
)
def test_the_tokens_left_are_those_within_both_limits(weights, top_p, top_k):
    p = np.array(weights) / sum(weights)
    order = np.argsort(-p)
    reached = np.cumsum(p[order])
    if np.abs(reached - top_p).min() < 1e-5:  # float32 can't tell
        return
    by_p = {int(t) for t, before in zip(order, [0, *reached[:-1]], strict=True) if before < top_p}
    by_k = set(order[: top_k or None].tolist())
    assert possible(torch.tensor(p).log().float(), 1.0, top_p, top_k) == by_p & by_k


def test_equal_shares_of_the_random_numbers():
    row = torch.zeros(4)
    assert [draw(row, 1.0, 1.0, 0, i / 8) for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_draws_follow_the_probabilities():
    """Chi-square of 4000 draws; 16.27 is exceeded once in a thousand with 3 degrees of freedom."""
    count = drawn(times=4000)
    expected = 4000 * np.array(list(PROBABILITIES.values()))
    assert (((count[list(PROBABILITIES)] - expected) ** 2) / expected).sum() < 16.27


def test_the_limits_are_on_the_probabilities_at_temperature_1():
    """As in ChatRWKV: 0.5 and 0.3 are left whatever the temperature, and then taken to its power."""
    count = drawn(temperature=0.5, top_p=0.75, times=4000)
    assert count[3] / 4000 == pytest.approx(0.25 / 0.34, abs=0.025)
    assert count[3] + count[9] == 4000
    flat = drawn(temperature=1e6, top_k=3)
    assert flat[[3, 9, 5]] / 2000 == pytest.approx([1 / 3] * 3, abs=0.04)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), top_p=st.floats(0.05, 0.999), top_k=st.integers(0, 6))
def test_leaves_the_tokens_that_the_official_package_leaves(seed, top_p, top_k):
    row = 2 * torch.randn(12, generator=torch.Generator().manual_seed(seed))
    np.random.seed(seed)
    pipeline = object.__new__(PIPELINE)
    official = {pipeline.sample_logits(row.clone(), temperature=3.0, top_p=top_p, top_k=top_k) for _ in range(150)}
    ours = possible(row, 3.0, top_p, top_k)
    assert official <= ours
    assert len(ours) - len(official) <= 1  # a rare one may not have come


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-320])
def test_a_low_temperature_is_greedy(temperature):
    """0.1 to the power of 1000 is no number any more."""
    row = likely({**dict.fromkeys(range(1, 11), 0.09), 11: 0.1})
    assert drawn(row, 20, temperature=temperature)[11] == 20


def test_zero_is_greedy():
    assert drawn(temperature=0.0, times=20)[3] == 20


def test_penalties_by_hand():
    """Greedy among 5.0, 4.9 and 4.0, with presence 0.5, frequency 0.25 and decay 0.5."""
    row = torch.tensor([5.0, 4.9, 4.0])
    draws = Draws(
        replace(SAMPLING, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, penalty_decay=0.5), 0
    )
    # before each draw:                              logits
    assert draws.next(row) == 0  #  counts {}        5.0    4.9     4.0
    assert draws.next(row) == 1  #  {0: 1}           4.25   4.9     4.0
    assert draws.next(row) == 0  #  {0: .5, 1: 1}    4.375  4.15    4.0
    assert draws.next(row) == 1  #  {0: 1.25, 1: .5} 4.1875 4.275   4.0
    assert draws.next(row) == 0  #  {0: .625, 1: 1.25} 4.34375 4.0875 4.0
    assert draws._count == {0: 1.3125, 1: 0.625}


def test_the_presence_penalty_does_not_decay():
    draws = Draws(replace(SAMPLING, temperature=0.0, presence_penalty=10.0, penalty_decay=0.0), 0)
    assert [draws.next(torch.tensor([5.0, 4.0, 3.0])) for _ in range(4)] == [0, 1, 2, 0]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), presence=st.floats(-1, 2), frequency=st.floats(-1, 2), decay=st.floats(0, 1))
def test_penalties_are_those_of_chatrwkv(seed, presence, frequency, decay):
    rows = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed))
    draws = Draws(
        replace(SAMPLING, temperature=0.0, presence_penalty=presence, frequency_penalty=frequency, penalty_decay=decay),
        0,
    )
    occurrence = {}
    for row in rows:
        out = row.clone()
        for n in occurrence:
            out[n] -= presence + occurrence[n] * frequency
        token = int(out.argmax())
        before = row.clone()
        if out.topk(2).values.diff().abs() < 1e-4:
            return
        assert draws.next(row) == token
        assert torch.equal(row, before)
        for n in occurrence:
            occurrence[n] *= decay
        occurrence[token] = 1 + occurrence.get(token, 0)


def test_a_seed_and_a_row_have_their_own_numbers():
    def numbers(seed, row):
        draws = Draws(replace(SAMPLING, seed=seed), row)
        return tuple(draws.next(ROW) for _ in range(40))

    assert numbers(1, 2) == numbers(1, 2)
    assert len({numbers(seed, row) for seed in range(4) for row in range(4)}) == 16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(value, temperature):
    row = torch.full((8,), -float("inf"))
    row[3] = value
    with pytest.raises(WorldError, match=r"logit is (nan|inf|-inf): must be finite; compute in bf16 or fp32"):
        draw(row, temperature, 1.0, 0, 0.5)


def test_forbidden_tokens_are_never_drawn():
    row = torch.full((8,), -float("inf"))
    row[3] = 1.0
    assert {draw(row, 1.0, 1.0, 0, u) for u in (0.0, 0.5, 1 - 2**-53)} == {3}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}, {"top_k": -1}, {"penalty_decay": 1.1}, {"stop": ("a", "")},
    ],
    ids=str,
)  # fmt: skip
def test_values_outside_their_range_are_refused(wrong):
    with pytest.raises(InputError, match=rf"{next(iter(wrong))} = .*; correct it"):
        replace(SAMPLING, **wrong)
