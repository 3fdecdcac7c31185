import os
from functools import partial

import pytest
import torch
from parity import assert_parity
from recurrence import DEVICES, Where, param
from sentinels import guard

from kernels import build
from kernels import channel_mix as module
from kernels.channel_mix import relu_squared, relu_squared_reference

WHERE = [Where("torch", "cpu"), Where("cpu", "cpu"), Where("torch", "cuda"), Where("triton", "cuda")]
if "TRITON_INTERPRET" in os.environ:
    WHERE.append(Where("triton", "cpu"))
EVERYWHERE = pytest.mark.parametrize("where", [param(where) for where in WHERE])
FUSED = pytest.mark.parametrize("where", [param(where) for where in WHERE if where.form != "torch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Around the 16 values of a vector, the 2048 of a program in Triton
SHAPES = [(1,), (15,), (16,), (17,), (3, 5, 7), (2, 3, 64), (2047,), (2, 1024), (2049,), (1, 70, 300)]


def draw(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def form(where):
    return partial(module.apply, where.form)


def run(op, x, dtype=None):
    """Output, and gradient under a random cotangent, which is the same for every precision."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = op(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(99)).to(dtype or y.dtype).to(y)
    return y.detach(), *torch.autograd.grad(y, x, dy)


def compare(op, x):
    exact = run(relu_squared_reference, x.double(), x.dtype)
    for name, got, want, truth in zip(("y", "dx"), run(op, x), run(relu_squared_reference, x), exact, strict=True):
        assert got.dtype == want.dtype == x.dtype
        assert_parity(name, got, want, truth)


def assert_equal(xs, ys):
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        assert torch.equal(x, y), i


@EVERYWHERE
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, where):
    compare(form(where), draw(*shape, dtype=dtype, device=where.device))


@EVERYWHERE
@DTYPES
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e3, 1e15])
def test_matches_reference_at_every_scale(scale, dtype, where):
    compare(form(where), scale * draw(3000, dtype=dtype, device=where.device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_precisions(dtype, device):
    x = draw(3, 700, dtype=dtype, device=device)
    compare(relu_squared, x)
    if device == "cpu":
        assert_equal(run(relu_squared, x), run(relu_squared_reference, x))


@FUSED
def test_is_its_formula(where):
    x = torch.tensor([[-3.0, -0.5, -0.0, 0.0], [0.25, 1.0, 3.0, 1.5]], device=where.device, requires_grad=True)
    y = form(where)(x)
    (dx,) = torch.autograd.grad(y, x, torch.tensor([[7.0, 7, 7, 7], [-2, 3, 0, 1]], device=where.device))
    assert y.tolist() == [[0, 0, 0, 0], [0.0625, 1, 9, 2.25]]
    torch.testing.assert_close(dx, torch.tensor([[0.0, 0, 0, 0], [-1, 6, 0, 3]], device=where.device))


def test_gradient_of_the_reference():
    assert torch.autograd.gradcheck(relu_squared_reference, draw(40, dtype=torch.float64).requires_grad_())


@FUSED
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # in NumPy, for the interpreter
@DTYPES
@pytest.mark.parametrize("size", [4, 33])  # by themselves, and in whole vectors
def test_values_out_of_the_ordinary(size, dtype, where):
    """Only where the square is too large or too small for its dtype does the gradient say less than the reference's."""
    inf, nan = float("inf"), float("nan")
    for value, known in (
        (nan, True), (-nan, True), (-inf, True), (-3e38, True), (-1e-30, True), (-0.0, True), (0.0, True), (1e-18, True),
        (1e18, True), (1.8e19, True), (2e19, False), (3e38, False), (inf, False), (1e-21, False), (1e-30, False),
    ):  # fmt: skip
        x = torch.full((size,), value, dtype=dtype, device=where.device)
        (y, dx), (want, slope) = run(form(where), x), run(relu_squared_reference, x)
        # Triton's interpreter cuts off bits, and more of what is not normal
        close = {"rtol": 2**-7, "atol": 2e-38} if where == Where("triton", "cpu") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(y, want, **close, equal_nan=True)
        if known:
            torch.testing.assert_close(dx, slope, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
        elif value < 1:
            assert (dx - slope).abs().max() < 1e-18
        else:
            assert (dx * slope.sign() > 1e18).all()


@FUSED
def test_one_nan_stays_one(where):
    x = draw(2100, device=where.device)
    x[5] = x[2099] = float("nan")
    for got in run(form(where), x):
        assert got.isnan().nonzero().flatten().tolist() == [5, 2099]


@EVERYWHERE
@DTYPES
def test_nothing_is_empty(dtype, where):
    y, dx = run(form(where), draw(0, 8, dtype=dtype, device=where.device))
    assert (y.shape, dx.shape) == ((0, 8), (0, 8))


@EVERYWHERE
@DTYPES
def test_non_contiguous_inputs_and_cotangents_are_read_right(dtype, where):
    op = form(where)
    x, dy = (draw(34, 5, 34, dtype=dtype, device=where.device) for _ in range(2))
    for view in (lambda x: x.mT, lambda x: x[:, :, 1:], lambda x: x[::2], lambda x: x[:, 1:2].expand(34, 5, 34)):
        assert not view(x).is_contiguous()
        strided, plain = view(x).detach().requires_grad_(), view(x).contiguous().requires_grad_()
        ys = op(strided), op(plain)
        assert torch.equal(*ys)
        assert_equal(
            torch.autograd.grad(ys[0], strided, view(dy)), torch.autograd.grad(ys[1], plain, view(dy).contiguous())
        )
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(op(leaf).sum(), leaf)  # whose cotangent is expanded
    torch.testing.assert_close(dx, 2 * x.relu())


@FUSED
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_writes_all_and_nothing_past_the_ends(shape, dtype, where, monkeypatch):
    if where.device == "cuda":
        pytest.skip("the sentinels are for the CPU")
    x = draw(*shape, dtype=dtype)
    check = guard(monkeypatch)
    y = module._forward(x, where.form)
    assert check() == 1
    module._backward(y.clone(), x, where.form)
    assert check() >= 2


@DTYPES
def test_in_place_it_writes_nothing_past_the_ends(dtype):
    for size in (1, 15, 16, 17, 1000):
        whole = torch.full((64 + size + 64,), -77.0, dtype=dtype)
        x = whole[64:-64].copy_(draw(size, dtype=dtype))
        want = relu_squared_reference(x)
        with torch.no_grad():
            assert relu_squared(x).data_ptr() == x.data_ptr()
        assert torch.equal(x, want)
        assert (whole[:64] == -77).all()
        assert (whole[-64:] == -77).all()


@EVERYWHERE
def test_reads_no_memory_that_it_has_not_written(where):
    x = draw(3, 700, device=where.device)
    clean = run(form(where), x)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        assert torch.empty(3).isnan().all()
        assert_equal(run(form(where), x), clean)
    finally:
        torch.use_deterministic_algorithms(False)


@EVERYWHERE
def test_inputs_are_left_as_they_were(where):
    x, dy = (draw(3, 700, device=where.device) for _ in range(2))
    before = x.clone()
    torch.autograd.grad(form(where)(x.requires_grad_()), x, dy)
    assert torch.equal(x, before)
    assert torch.equal(dy, before)


@FUSED
def test_keeps_only_its_output_for_the_backward(where):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        y = form(where)(draw(3, 70, device=where.device).requires_grad_())
    assert kept == [y.data_ptr()]


@FUSED
def test_is_a_sound_custom_op(where):
    x = draw(3, 7, device=where.device).mT
    torch.library.opcheck(module._forward.registered, (x.detach().requires_grad_(), where.form))
    torch.library.opcheck(module._forward.registered, (x, where.form))
    torch.library.opcheck(module._backward.registered, (x.relu(), x, where.form))


@EVERYWHERE
def test_works_under_compile_and_checkpointing(where):
    x, op = draw(3, 70, device=where.device), form(where)
    want = run(op, x)
    assert_equal(run(torch.compile(op, backend="aot_eager", fullgraph=True), x), want)
    assert_equal(run(partial(torch.utils.checkpoint.checkpoint, op, use_reentrant=False), x), want)


def test_choosing_works_under_compile():
    x = draw(3, 70)
    compiled = torch.compile(relu_squared, backend="aot_eager", fullgraph=True)
    assert_equal(run(compiled, x), run(relu_squared, x))
    with torch.no_grad():
        assert torch.equal(compiled(x.clone()), relu_squared(x.clone()))


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_a_bit(threads, monkeypatch):
    x = draw(3 * (1 << 14) + 5)
    want = run(form(Where("cpu", "cpu")), x)
    monkeypatch.setattr(build, "threads", lambda: threads)
    assert_equal(run(form(Where("cpu", "cpu")), x), want)


@pytest.mark.parametrize("device", DEVICES)
@DTYPES
def test_where_nobody_asks_for_gradients_it_is_done_in_place(dtype, device):
    for x in (draw(3, 70, dtype=dtype, device=device), draw(3, 70, dtype=dtype, device=device).mT):
        want, mine = relu_squared(x.clone().requires_grad_()).detach(), x.clone(memory_format=torch.preserve_format)
        with torch.no_grad():
            assert relu_squared(mine).data_ptr() == mine.data_ptr()
        assert torch.equal(mine, want)
        with torch.inference_mode():
            mine = x.clone(memory_format=torch.preserve_format)
            assert torch.equal(relu_squared(mine), want)


def test_what_cannot_be_is_refused_in_place_too():
    with torch.no_grad(), pytest.raises(ValueError, match="op='cpu'"):
        relu_squared(draw(3, 70).double(), op="cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_does_not_change_it(device):
    x = draw(3, 70, device=device)
    want = run(relu_squared, x)
    with torch.autocast(device, torch.bfloat16):
        assert_equal(run(relu_squared, x), want)
        with torch.no_grad():
            assert torch.equal(relu_squared(x.clone()), want[0])


def test_every_form_is_chosen_where_it_works(monkeypatch):
    x = draw(3, 70)
    fused, plain = run(form(Where("cpu", "cpu")), x), run(relu_squared_reference, x)
    assert not torch.equal(fused[1], plain[1])
    for op in ("auto", "cpu", "fla", "cuda", "torch", "reference"):
        assert_equal(run(partial(relu_squared, op=op), x), plain if op in ("torch", "reference") else fused)
    with pytest.raises(ValueError, match=r"channel_mix: op='cpu' for torch\.float64 on cpu; .*; or say op='auto'"):
        relu_squared(x.double(), op="cpu")
    with pytest.raises(ValueError, match=r"channel_mix: op='triton' for torch\.float32 on cpu"):
        relu_squared(x, op="triton")
    monkeypatch.setattr(build, "library", lambda *_: None)
    assert_equal(run(relu_squared, x), plain)
    with torch.no_grad():
        assert torch.equal(relu_squared(x.clone()), plain[0])
    with pytest.raises(RuntimeError, match="channel_mix: op='cpu' could not be compiled"):
        relu_squared(x, op="cpu")


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_other_devices(device):
    assert relu_squared(draw(3, 4).to(device)).device.type == device
