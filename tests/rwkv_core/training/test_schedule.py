import itertools
import math

import pytest
from pydantic import ValidationError

from rwkv_core.config import OptimizerConfig
from rwkv_core.errors import InputError
from rwkv_core.training.schedule import check, learning_rate


def config(schedule="linear", warmup_steps=4, lr=0.01, lr_final=0.001):
    return OptimizerConfig(
        lr=lr, lr_final=lr_final, schedule=schedule, warmup_steps=warmup_steps, weight_decay=0.0, betas=(0.9, 0.99),
        eps=1e-18, grad_clip=1.0,
    )  # fmt: skip


def rates(steps, **changes):
    return [learning_rate(config(**changes), step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_shape(schedule):
    rises = rates(24, schedule=schedule)
    assert rises[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rises[4] == pytest.approx(0.01)
    assert rises[-1] == pytest.approx(0.001)
    assert all(one > other for one, other in itertools.pairwise(rises[4:]))
    middle = learning_rate(config(schedule), 4 + 19 // 2, 4 + 19 + 1)
    part = (19 // 2) / 19
    want = {"linear": 0.001 + 0.009 * (1 - part), "cosine": 0.001 + 0.009 * (1 + math.cos(math.pi * part)) / 2}
    assert middle == pytest.approx(want[schedule])


def test_constant_stays():
    assert rates(10, schedule="constant", warmup_steps=0, lr_final=0.01) == [0.01] * 10


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_shortest_runs(schedule):
    assert rates(1, schedule=schedule, warmup_steps=0) == pytest.approx([0.01])
    assert rates(2, schedule=schedule, warmup_steps=0) == pytest.approx([0.01, 0.001])
    assert rates(2, schedule=schedule, warmup_steps=1) == pytest.approx([0.01, 0.01])


def test_beyond_the_end_it_stays_at_its_last_value():
    """Lightning asks for the rate of one step more than there are."""
    assert learning_rate(config("cosine"), 30, 24) == pytest.approx(0.001)


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_warmup_that_does_not_end_is_refused(steps):
    with pytest.raises(
        InputError, match=rf"warmup_steps = 4: this run has {steps} optimizer steps, .*; lower it, or train longer"
    ):
        check(config(), steps)
    check(config(), 5)


@pytest.mark.parametrize("changes", [{"schedule": "constant"}, {"lr_final": 0.02}])
def test_a_final_rate_without_effect_or_above_the_first_is_refused(changes):
    with pytest.raises(ValidationError):
        config(**changes)
