"""That the proof of parity proves something: each fault, planted in the chunked WKV-7, must fail it."""

import types
from pathlib import Path

import pytest
import torch
from parity import assert_parity
from recurrence import draw_wkv7, run

from kernels import wkv7, wkv7_torch

FAULTS = {
    "wrong factor": ("later_a = torch.exp(with_t - log_decay - middle)", "later_a = torch.exp(with_t - middle)"),
    "transposed operand": ("own = c.inverse @ (c.ak @ c.v)", "own = c.inverse @ (c.ak.mT @ c.v)"),
    "reversed time": (
        "dlog_end = from_end - change.flip(-2).cumsum(-2).flip(-2)",
        "dlog_end = from_end - change.cumsum(-2)",
    ),
    "dropped term": ("dv = c.rk.mT @ dy_ + k_end @ after.mT + c.ak.mT @ dz", "dv = c.rk.mT @ dy_ + k_end @ after.mT"),
    "bf16 state": ("    before = states[:-1]\n", "    before = states[:-1] = states[:-1].bfloat16().float()\n"),
    "off-by-one chunk": ("    after = grads[1:]\n", "    after = grads[:-1]\n"),
    "swapped dk and dv": ("return dr, dw_raw, dk, dv, da, db", "return dr, dw_raw, dv, dk, da, db"),
    "missing tail": ("return x[:, :steps].to(", "x[:, steps - 1] = 0\n    return x[:, :steps].to("),
    "the first state's gradient": ("grads[0].clone().view_as(dfinal)", "grads[1].clone().view_as(dfinal)"),
    "a padded step that decays": ("fill=-torch.inf", "fill=0.0"),
    "1 - sigmoid": ("torch.sigmoid(-_split(w_raw, length, before.dtype))", "(1 - c.sigmoid)"),
}


def prove(module, monkeypatch):
    """What the tests of parity do, on the smallest inputs that show all these faults."""
    monkeypatch.setattr(wkv7, "_implementation", lambda _: module)

    def op(*xs):
        return wkv7.apply("torch", *xs)

    for xs in (draw_wkv7(1, 37, 2, 16), draw_wkv7(1, 16, 1, 8)):
        exact = run(wkv7.wkv7_reference, [x.double() for x in xs], torch.float32)
        slow = run(wkv7.wkv7_reference, xs)
        for i, (got, want, right) in enumerate(zip(run(op, xs), slow, exact, strict=True)):
            assert_parity(str(i), got, want, right)
    xs = draw_wkv7(1, 20, 1, 8, decay="strongest")
    dw_raw = run(op, xs)[3]
    truth = run(wkv7.wkv7_reference, [x.double() for x in xs], torch.float32)[3]
    assert (dw_raw - truth).norm() < 1e-5 * truth.norm()


def test_the_sound_one_passes(monkeypatch):
    prove(wkv7_torch, monkeypatch)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, monkeypatch):
    source = Path(wkv7_torch.__file__).read_text(encoding="utf-8")
    sound, broken = FAULTS[fault]
    assert source.count(sound) == 1, "the code has changed: plant the fault anew"
    module = types.ModuleType("broken")
    exec(source.replace(sound, broken), module.__dict__)
    with pytest.raises(AssertionError, match=r"error|NaN|norm"):
        prove(module, monkeypatch)
