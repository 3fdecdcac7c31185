import logging

import pytest
import torch

from kernels import build, choice
from kernels.choice import WKV, choose, recurrence

X = torch.zeros(1)


class Gpu:
    """What the choice looks at of a tensor on a GPU."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda")

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype


@pytest.fixture
def here(monkeypatch):
    """Says what is installed and what can be built."""

    def say(*forms, hip=None):
        monkeypatch.setattr(build, "available", lambda _, kind="cpu": kind in forms)
        monkeypatch.setattr(choice, "_installed", lambda module: module in forms)
        monkeypatch.setattr(torch.version, "hip", hip)

    return say


def test_auto_takes_the_fastest_that_works(here):
    everything = ("cpu", "cuda", "triton", "fla")
    for forms, x, want in (
        (everything, X, "cpu"),
        (everything, X.bfloat16(), "cpu"),
        (everything, X.double(), "torch"),
        (everything, X.to("meta"), "torch"),
        ((), X, "torch"),
        (everything, Gpu(), "cuda"),
        (everything, Gpu(torch.float64), "torch"),
        (("triton", "fla"), Gpu(torch.float16), "triton"),
        (("fla",), Gpu(torch.bfloat16), "fla"),
        ((), Gpu(), "torch"),
    ):
        here(*forms)
        assert choose("wkv7", "auto", WKV, x) == want
    here(*everything, hip="6.4")
    assert choose("wkv7", "auto", WKV, Gpu()) == "triton"


def test_one_step_without_compiled_code_is_the_equations_themselves(here):
    here()
    assert [recurrence("wkv7", "auto", X, steps) for steps in (1, 2)] == ["reference", "torch"]
    assert recurrence("wkv7", "torch", X, 1) == "torch"
    here("cpu")
    assert recurrence("wkv7", "auto", X, 1) == "cpu"


def test_what_an_operator_does_not_have_is_for_others(here):
    here("cpu", "triton")
    for op in ("cuda", "fla"):
        assert choose("token_shift", op, ("cpu", "triton", "torch"), X) == "cpu"
        assert choose("token_shift", op, ("cpu", "triton", "torch"), Gpu()) == "triton"
    for op in ("torch", "reference"):
        assert choose("token_shift", op, ("cpu", "triton", "torch"), X) == op


@pytest.mark.parametrize(
    ("op", "x", "forms", "error", "message"),
    [
        (
            "cpu",
            X.double(),
            ("cpu",),
            ValueError,
            r"op='cpu' for torch\.float64 on cpu; it works on .*; or say op='auto'",
        ),
        ("cpu", X.to("meta"), ("cpu",), ValueError, r"op='cpu' for torch\.float32 on meta"),
        ("cpu", X, (), RuntimeError, "wkv7: op='cpu' could not be compiled: a warning has said why"),
        ("cuda", X, ("cuda",), ValueError, "op='cuda' for torch.float32 on cpu; it works on .* on a GPU"),
        ("cuda", Gpu(), (), RuntimeError, "wkv7: op='cuda' could not be compiled"),
        ("triton", Gpu(), (), RuntimeError, "needs triton, which is not installed; pip install triton"),
        ("fla", Gpu(), (), RuntimeError, "needs fla-core, which is not installed; pip install fla-core"),
    ],
)
def test_what_can_not_work_is_refused(op, x, forms, error, message, here):
    here(*forms)
    with pytest.raises(error, match=message):
        choose("wkv7", op, WKV, x)


def test_cuda_is_not_for_other_makers_gpus(here):
    here("cuda", hip="6.4")
    with pytest.raises(ValueError, match=r"op='cuda' on an AMD GPU; .*say op='triton'"):
        choose("wkv7", "cuda", WKV, Gpu())


def test_a_choice_is_logged_once_for_each_kind_of_tensor(caplog):
    choice._say.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels"):
        for x in (X, X, X.bfloat16(), X.bfloat16(), X):
            choose("wkv7", "torch", WKV, x)
        choose("wkv6", "torch", WKV, X)
    assert [r.getMessage() for r in caplog.records] == [
        "wkv7 on cpu, float32: torch",
        "wkv7 on cpu, bfloat16: torch",
        "wkv6 on cpu, float32: torch",
    ]
