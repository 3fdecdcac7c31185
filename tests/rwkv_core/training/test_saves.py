"""Which adapters are kept of a run, and that they are what was learned at the time."""

import math

import pytest
from pydantic import ValidationError
from train_settings import SETTINGS

from rwkv_core.config import SavesConfig
from rwkv_core.training.saves import Plan


def plan(epochs=2.0, steps=10, **settings):
    return Plan(SavesConfig(**SETTINGS["saves"] | settings), epochs, steps)


def losses(*values):
    """Held-out losses after steps 0, 2, 4, ..."""
    return {2 * i: {"loss": value} for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, []),
        ({"every": 3}, [3, 6, 9, 10]),
        ({"every": 5}, [5, 10]),
        ({"every": 50}, [10]),
        ({"every_epochs": 1.0}, [5, 10]),
        ({"every_epochs": 0.5}, [3, 5, 8, 10]),
        ({"every_epochs": 3.0}, [10]),
        ({"every": 4, "every_epochs": 1.0}, [4, 5, 8, 10]),
        ({"every": 3, "keep_last": 2}, [9, 10]),
        ({"every": 3, "keep_last": 20}, [3, 6, 9, 10]),
        ({"keep_best": 2}, [4, 8]),
        ({"keep_best": 2, "every": 6, "keep_last": 1}, [4, 8, 10]),
        ({"keep_best": 9}, [2, 4, 6, 8, 10]),
        ({"result": "best"}, []),
    ],
)
def test_what_is_kept(settings, kept):
    """Step 0, the untrained model, is never among the best; of equal losses the earlier is better."""
    assert sorted(plan(**settings).kept(10, losses(0.1, 3.0, 2.0, 2.5, 2.0, 2.5))) == kept


def test_an_epoch_of_no_whole_number_of_steps_ends_in_the_step_that_ends_it():
    """One of three steps and a third ends in the fourth, the next in the seventh. Rounding makes no step more."""
    assert plan(epochs=2.7, steps=9, every_epochs=1.0).periodic(9) == [4, 7, 9]
    assert plan(epochs=0.3, steps=3, every_epochs=0.1).periodic(3) == [1, 2, 3]


def test_what_is_kept_on_the_way_is_what_the_end_may_need():
    chosen = plan(keep_best=1, every=4, keep_last=1, result="best")
    valid = losses(9.0, 3.0, 2.0, 1.0, 2.0, 3.0)
    assert chosen.needed(5, valid) == {4}
    assert chosen.needed(6, valid) == {4, 6}
    assert chosen.needed(10, valid) == {10, 6}
    assert chosen.result(10, valid) == 6


def test_losses_that_are_no_numbers_are_no_best():
    chosen = plan(keep_best=1, result="best")
    assert chosen.result(10, losses(1.0, math.nan, 5.0, math.nan, math.nan, math.nan)) == 4
    assert chosen.result(10, losses(1.0, *[math.nan] * 5)) == 10
    assert chosen.kept(10, losses(1.0, *[math.nan] * 5)) == set()


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValidationError, match="keep_last is of the adapters kept by every and every_epochs"):
        plan(keep_last=1)


def test_a_run_that_ends_early_keeps_its_last():
    """As one does whose last step was planned."""
    valid = losses(9.0, 3.0, 2.0, 2.5)
    assert plan(every=4).kept(6, valid, ended=True) == {4, 6}
    assert plan(every=4).kept(6, valid) == {4}
    assert plan(every=4, keep_last=1).kept(6, valid, ended=True) == {6}
    assert plan().kept(6, valid, ended=True) == set()
    assert plan().result(6, valid) == 6
    assert plan(result="best").result(6, valid) == 4
