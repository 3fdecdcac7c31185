"""A run ends when the held-out loss falls no more, at the same step however often it was stopped on the way."""

import pytest
import torch
from guarded import Stop, bits, equal, lay, settings, train

from rwkv_core.config import StopEarlyConfig
from rwkv_core.errors import InputError
from rwkv_core.training.early import has_settled, is_over

TWO = StopEarlyConfig(patience=2, min_gain=0.1)


@pytest.mark.parametrize(
    ("losses", "settled"),
    [
        ([], False),
        ([3.0, 2.9], False),
        ([3.0, 2.95, 2.95], True),
        ([3.0, 2.95, 2.8], False),
        ([3.0, 2.95, 2.8, 2.75], False),
        ([3.0, 2.8, 2.9, 2.71], True),
        ([3.0, float("nan"), float("nan")], True),
    ],
)
def test_patience_counts_what_was_no_gain(losses, settled):
    history = {4 * i: {"loss": loss} for i, loss in enumerate(losses)}
    assert has_settled(history, TWO) == settled
    assert not has_settled(history, None)
    last = max(history, default=0)
    assert is_over({"valid": history}, last, 99, TWO) == settled
    assert not is_over({"valid": history}, last + 1, 99, TWO)
    assert is_over({"valid": history}, 99, 99, None)


@pytest.fixture
def place(tmp_path):
    lay(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_run_ends_early_and_ends_there_again(place):
    early = settings(steps=14, validate_every=2, checkpoint_every=4, stop_early={"patience": 2, "min_gain": 0.2})
    calls = []
    whole, result = train(place, early, log=lambda step, metrics: calls.append(step))
    _, full = train(place, settings(steps=14, validate_every=2), folder="full")
    assert 4 <= result.steps < 14
    assert list(result.history["train"]) == list(range(1, result.steps + 1))
    assert result.history["train"] == {n: row for n, row in full.history["train"].items() if n <= result.steps}
    assert max(result.history["valid"]) == result.steps
    assert result.tokens == result.history["train"][result.steps]["tokens"]
    assert torch.load(place / "run" / "last.ckpt", weights_only=True)["global_step"] == result.steps
    for at in range(2, len(calls) + 1, 3):

        def stop(step, metrics, seen=[], at=at):  # noqa: B006 -- one list for each definition
            seen.append(step)
            if len(seen) == at:
                raise Stop

        with pytest.raises(Stop):
            train(place, early, folder=f"run {at}", log=stop)
        again, other = train(place, early, folder=f"run {at}")
        assert equal(bits(again), bits(whole))
        assert other.history == result.history
    again, other = train(place, early)  # killed after the end: nothing is learned again
    assert equal(bits(again), bits(whole))
    assert (other.resumed_at, other.steps, other.history) == (result.steps, result.steps, result.history)


def test_one_that_gains_goes_on_to_its_end(place):
    _, result = train(place, settings(steps=9, stop_early={"patience": 3, "min_gain": 0.0}))
    assert result.steps == 9


def test_a_run_that_halts_goes_on_without_a_seam(place):
    own = {"validate_every": 2, "checkpoint_every": 3, "saves": {"every": 3, "keep_best": 1, "result": "best"}}
    long = {"steps": 10, **own, "optimizer": {"lr": 0.02, "lr_final": 0.001, "schedule": "cosine"}}
    kept = place / "run" / "saves"

    def keep(path, step=None):
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(step))

    whole, result = train(place, settings(**long), folder="whole", keep=keep)
    assert not result.halted
    for halt in (4, 4, 8):
        _, other = train(place, settings(**long, halt=halt), keep=keep)
        assert other.halted
        assert other.steps == halt
        assert max(other.history["valid"]) == halt
        assert other.history["train"] == {n: row for n, row in result.history["train"].items() if n <= halt}
        assert all(path.exists() for path in (*other.kept.values(), other.best or kept))
    with pytest.raises(InputError, match=r"train\.halt = 6: the run has gone on until step 8; set a later one"):
        train(place, settings(**long, halt=6), keep=keep)
    again, last = train(place, settings(**long), keep=keep)
    assert (last.resumed_at, last.halted) == (8, False)
    assert equal(bits(again), bits(whole))
    assert last.history == result.history
    named = [[(step, path.read_text()) for step, path in each.kept.items()] for each in (result, last)]
    assert named[0] == named[1]
    assert (last.step, last.best and last.best.name) == (result.step, result.best and result.best.name)


def test_a_halt_at_the_end_is_the_end(place):
    _, result = train(place, settings(steps=4, validate_every=2, halt=4))
    assert (result.steps, result.halted) == (4, False)


def test_a_halt_between_two_measurements_is_refused():
    with pytest.raises(ValueError, match="halt = 3 is no multiple of validate_every = 2"):
        settings(steps=4, validate_every=2, halt=3)
