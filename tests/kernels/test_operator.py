from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.operator import operator

CALLS = []


@operator("rwkv_test::weighted")
def weighted(x: Tensor, weight: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """x weight^power, and a result that gets no gradient."""
    CALLS.append("weighted")
    return x * weight**power, x.new_ones(1)


@weighted.register_fake
def _(x: Tensor, weight: Tensor, power: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(1)


@operator("rwkv_test::slope")
def slope(factors: list[Tensor], weight: Tensor, power: int) -> Tensor:
    """The product of the factors and the power's derivative."""
    CALLS.append("slope")
    return factors[0] * factors[1] * power * weight ** (power - 1)


@slope.register_fake
def _(factors: list[Tensor], weight: Tensor, power: int) -> Tensor:
    return weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    x, weight, ctx.power = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _grad(ctx, dy, dother):
    assert dother is None
    x, weight = ctx.saved_tensors
    return None, slope([dy, x], weight, ctx.power) if ctx.needs_input_grad[1] else None, None


weighted.register_autograd(_grad, setup_context=_save)


class Seen(TorchDispatchMode):
    """Names of the operators that pass the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, generator=generator), torch.rand(5, generator=generator).requires_grad_(), 3


def gradient(call, x, weight, power):
    y, other = call(x, weight, power)
    return y, other, *torch.autograd.grad(y, weight, torch.arange(5.0))


def test_a_plain_call_gives_what_the_registered_one_does(given):
    for mine, registered in zip(gradient(weighted, *given), gradient(weighted.registered, *given), strict=True):
        assert torch.equal(mine, registered)


def test_a_plain_call_passes_the_dispatcher_by(given):
    y, _ = weighted(*given)
    assert y.grad_fn.name() == "rwkv_test::weightedBackward"
    with torch.no_grad():
        assert not weighted(*given)[0].requires_grad


def test_who_watches_the_dispatcher_sees_the_operator(given):
    with Seen() as seen:
        gradient(weighted, *given)
    assert {"rwkv_test.weighted.default", "rwkv_test.slope.default"} <= set(seen.names)


class Own(Tensor):
    """One that has a say of its own."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_other_kinds_of_tensors_go_to_the_dispatcher(given):
    x, weight, power = given
    Own.names.clear()
    weighted(x.as_subclass(Own), weight, power)
    slope([x, x.as_subclass(Own)], weight.detach(), power)
    assert {"rwkv_test.weighted.default", "rwkv_test.slope.default"} <= set(Own.names)
    CALLS.clear()
    assert weighted(x.to("meta"), weight.to("meta"), power)[0].shape == x.shape
    assert slope([x.to("meta")] * 2, weight.detach().to("meta"), power).shape == x.shape
    assert not CALLS  # what has no memory is not run on, but has its shape told


def test_lists_get_their_gradients_from_the_dispatcher(given):
    @operator("rwkv_test::total")
    def total(xs: list[Tensor]) -> Tensor:
        return xs[0] + xs[1]

    total.register_autograd(lambda ctx, dy: ([dy, dy],), setup_context=lambda ctx, inputs, output: None)
    x = given[1]
    assert torch.equal(torch.autograd.grad(total([x, x]).sum(), x)[0], torch.full((5,), 2.0))


def test_torch_compile_takes_it_whole(given):
    x, weight, power = given
    compiled = torch.compile(lambda weight: weighted(x, weight, power)[0] * 2, fullgraph=True, backend="aot_eager")
    y, want = compiled(weight), gradient(weighted, *given)
    assert torch.equal(y, 2 * want[0])
    assert torch.equal(torch.autograd.grad(y, weight, torch.arange(5.0) / 2)[0], want[2])


def test_a_second_derivative_is_refused(given):
    first = torch.autograd.grad(weighted(*given)[0].sum(), given[1], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"rwkv_test\.slope"):
        first.sum().backward()
