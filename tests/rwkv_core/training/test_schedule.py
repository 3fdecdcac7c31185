import itertools
import math

import pytest
from pydantic import ValidationError
from train_settings import train_config

from rwkv_core.errors import InputError
from rwkv_core.training.schedule import check, learning_rate

BOTH = {"schedule": "linear", "warmup_steps": 4, "lr": 0.01, "lr_final": 0.001}


def config(schedule="linear", **changes):
    if schedule == "wsd":
        changes = {"decay": 5, "decay_form": "linear"} | changes
    return train_config(optimizer=BOTH | {"schedule": schedule} | changes).optimizer


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


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential", "wsd"])
def test_beyond_the_end_it_stays_at_its_last_value(schedule):
    """Lightning asks for the rate of one step more than there are."""
    assert learning_rate(config(schedule), 30, 24) == pytest.approx(0.001)


def by_rwkv_lm(s, total, w, lr, final, share):
    """RWKV-LM's rate of step s, for runs that are counted in steps, by what its documentation and code say it is."""
    progress = min(1, max(0, (s - w + 1) / (total - w)))
    rate = lr + (final - lr) * progress if final == 0 else lr * math.exp(math.log(final / lr) * progress)
    return rate * (share + (1 - share) * s / w) if s < w else rate


def by_exit_tokens(s, exit_steps, w, lr, final, share):
    """RWKV-LM's rate of step s, for runs that end at a number of tokens: those of `exit_steps`."""
    progress = max(0, min(1, (s - w) / (exit_steps - w)))
    f = final / lr
    rate = lr * (0.5 + f / 2 + (0.5 - f / 2) * math.cos(math.pi * progress))
    return rate * (share + (1 - share) * s / w) if s < w else rate


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("share", [0.2, 0.01])
def test_exponential_is_rwkv_lm_s(warmup, share):
    found = rates(40, schedule="exponential", warmup_steps=warmup, warmup_from=share if warmup else None)
    assert found == pytest.approx([by_rwkv_lm(s, 40, warmup, 0.01, 0.001, share) for s in range(40)], rel=1e-12)
    assert found[-1] == pytest.approx(0.001)
    falls = found[warmup:]
    assert all(two / one == pytest.approx(falls[1] / falls[0]) for one, two in itertools.pairwise(falls))


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("share", [0.2, 0.01])
def test_cosine_is_rwkv_lm_s_whose_exit_tokens_are_a_step_short(warmup, share):
    """Its last step is the one before the end of the cosine; ours has lr_final itself."""
    found = rates(40, schedule="cosine", warmup_steps=warmup, warmup_from=share if warmup else None)
    assert found == pytest.approx([by_exit_tokens(s, 39, warmup, 0.01, 0.001, share) for s in range(40)], rel=1e-12)


def test_cosine_is_rwkv_peft_s():
    """Half a wave over the run; RWKV-PEFT's reaches its end a step after the last."""
    found = rates(41, schedule="cosine", warmup_steps=0)
    want = [0.001 + 0.5 * 0.009 * (1 + math.cos(math.pi * s / 40)) for s in range(40)] + [0.001]
    assert found == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential", "wsd"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
def test_a_warmup_from_a_share(schedule, share):
    final = 0.01 if schedule == "constant" else 0.001
    found = rates(30, schedule=schedule, warmup_steps=10, warmup_from=share, lr_final=final)
    assert found[:10] == pytest.approx([0.01 * (share + (1 - share) * s / 10) for s in range(10)], abs=1e-15)
    assert found[10] <= 0.01 + 1e-12
    if schedule != "exponential":
        assert found[10] == pytest.approx(0.01)


@pytest.mark.parametrize("form", ["linear", "cosine", "exponential", "sqrt"])
@pytest.mark.parametrize("decay", [8, "20%"])
def test_wsd_warms_up_stays_and_decays(form, decay):
    found = rates(40, schedule="wsd", decay=decay, decay_form=form)
    assert found[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert found[4:32] == pytest.approx([0.01] * 28)
    formulas = {
        "linear": lambda x: 0.001 + 0.009 * (1 - x),
        "cosine": lambda x: 0.001 + 0.0045 * (1 + math.cos(math.pi * x)),
        "exponential": lambda x: 0.01 * 0.1**x,
        "sqrt": lambda x: 0.001 + 0.009 * (1 - math.sqrt(x)),
    }
    assert found[32:] == pytest.approx([formulas[form]((i + 1) / 8) for i in range(8)], rel=1e-12)
    assert found[-1] == pytest.approx(0.001)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_to_nothing(schedule):
    found = rates(24, schedule=schedule, lr_final=0.0)
    assert found[-1] == pytest.approx(0, abs=1e-18)
    assert all(rate > 0 for rate in found[:-1])


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_warmup_that_does_not_end_is_refused(steps):
    with pytest.raises(
        InputError, match=rf"warmup_steps = 4: this run has {steps} optimizer steps, .*; lower it, or train longer"
    ):
        check(config(), steps)
    check(config(), 5)


def test_a_decay_that_begins_in_the_warmup_is_refused():
    with pytest.raises(InputError, match=r"decay = 70%: is 14 steps, and the warm-up 7; this run has 20; lower one of"):
        check(config("wsd", decay="70%", warmup_steps=7), 20)
    check(config("wsd", decay="70%", warmup_steps=6), 20)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"schedule": "constant"}, "a constant schedule stays at lr"),
        ({"lr_final": 0.02}, "is above lr"),
        ({"schedule": "exponential", "lr_final": 0}, "never gets to lr_final = 0"),
        ({"schedule": "wsd", "decay_form": "exponential", "lr_final": 0}, "never gets to lr_final = 0"),
        ({"schedule": "wsd", "decay": None}, "schedule = wsd needs decay"),
        ({"schedule": "wsd", "decay_form": None}, "schedule = wsd needs decay_form"),
        ({"schedule": "wsd", "decay": "0%"}, "above 0 %"),
        ({"schedule": "wsd", "decay": "101%"}, "at most 100 %"),
        ({"decay": 5}, "decay = 5 is of schedule = wsd alone"),
        ({"decay_form": "sqrt"}, "decay_form = sqrt is of schedule = wsd alone"),
        ({"warmup_steps": 0, "warmup_from": 0.2}, "warmup_from = 0.2 is of a warm-up"),
        ({"momentum": 0.9}, "momentum = 0.9 is of kind = muon alone"),
        ({"kind": "muon"}, "kind = muon needs momentum"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(changes, rule):
    with pytest.raises(ValidationError, match=rule):
        config(**changes)
