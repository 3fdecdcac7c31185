from functools import partial

import pytest
import torch
from parity import assert_parity
from sentinels import guard

from kernels import build
from kernels.time_mix7 import prepare, prepare_reference, readout, readout_reference, relu_squared

DTYPES = [torch.float32, torch.bfloat16]
# batch, steps, heads, head size
SHAPES = [(1, 1, 1, 8), (1, 1, 12, 64), (2, 3, 2, 16), (1, 40, 3, 33), (2, 17, 1, 5), (1, 60, 8, 64)]
EPS = 64e-5


def draws(dtype, stored):
    generator = torch.Generator().manual_seed(0)

    def activation(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def parameter(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(stored)

    return activation, parameter


def before(batch, steps, heads, size, dtype=torch.float32, stored=None, layer_0=False):
    """Arguments of `prepare`."""
    activation, parameter = draws(dtype, stored or dtype)
    k0, v0, v_first, a_raw, v_raw = (activation(batch, steps, heads * size) for _ in range(5))
    if layer_0:
        v_first = v_raw = None
    return [k0, v0, v_first, a_raw, v_raw, parameter(1, 1, heads * size), parameter(1, 1, heads * size)]


def after(batch, steps, heads, size, dtype=torch.float32, stored=None):
    """Arguments of `readout`."""
    activation, parameter = draws(dtype, stored or dtype)
    four = [activation(batch, steps, heads, size) for _ in range(4)]
    vectors = [parameter(heads * size) for _ in range(2)]
    return [*four, activation(batch, steps, heads * size), *vectors, parameter(heads, size)]


def double(xs):
    return [None if x is None else x.double() for x in xs]


def results(y):
    return y if isinstance(y, tuple) else (y,)


def cases(*shape, **kwargs):
    """Each operator with its reference and arguments."""
    size = shape[3]
    for layer_0 in (False, True):
        xs = before(*shape, **kwargs, layer_0=layer_0)
        yield partial(prepare, size=size), partial(prepare_reference, size=size), xs
    yield partial(readout, eps=EPS), partial(readout_reference, eps=EPS), after(*shape, **kwargs)


@pytest.fixture
def compiled(monkeypatch):
    for name in ("prepare_reference", "readout_reference"):
        monkeypatch.setattr(f"kernels.time_mix7.{name}", lambda *_: pytest.fail("left to torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, stored, dtype, compiled):
    for op, reference, xs in cases(*shape, dtype=dtype, stored=stored):
        if stored == dtype:
            slow = reference(*xs)
        else:  # torch would compute in the wider of the two; the result is rounded once, as ours is
            slow = tuple(x.to(dtype) for x in results(reference(*(x if x is None else x.float() for x in xs))))
        for i, (got, want, truth) in enumerate(
            zip(results(op(*xs)), results(slow), results(reference(*double(xs))), strict=True)
        ):
            assert got.dtype == dtype
            assert_parity(f"{op.func.__name__} {i}", got, want, truth)


def test_prepare_is_its_formula():
    k0, v0, v_first, a_raw, v_raw, k_k, k_a = xs = before(1, 1, 1, 3)
    k, v, a, b = (x.flatten().tolist() for x in prepare(*xs, size=3))
    along = [k0[0, 0, i].item() * k_k[0, 0, i].item() for i in range(3)]
    length = sum(u * u for u in along) ** 0.5
    for i in range(3):
        rate, share = (1 / (1 + torch.e ** -x[0, 0, i].item()) for x in (a_raw, v_raw))
        assert a[i] == pytest.approx(-along[i] / length, rel=1e-5)
        assert b[i] == pytest.approx(along[i] / length * rate, rel=1e-5)
        assert k[i] == pytest.approx(k0[0, 0, i].item() * (1 + (rate - 1) * k_a[0, 0, i].item()), rel=1e-5)
        assert v[i] == pytest.approx(v0[0, 0, i].item() * (1 - share) + v_first[0, 0, i].item() * share, rel=1e-5)


def test_readout_is_its_formula():
    y, r, k, v, g, weight, bias, r_k = (x.double().flatten() for x in after(1, 1, 1, 4))
    normed = (y - y.mean()) / (y.var(correction=0) + EPS).sqrt() * weight + bias
    want = (normed + (r * k * r_k).sum() * v) * g
    torch.testing.assert_close(readout(*after(1, 1, 1, 4), eps=EPS).double().flatten(), want, rtol=1e-5, atol=1e-6)


def test_a_key_of_zeros_has_no_direction(compiled):
    xs = before(1, 2, 2, 16)
    xs[0] = torch.zeros_like(xs[0])
    assert all((x == 0).all() for x in (prepare(*xs, size=16)[i] for i in (0, 2, 3)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_all_and_nothing_past_the_ends(shape, dtype, monkeypatch):
    for op, _, xs in cases(*shape, dtype=dtype):
        kept = double(xs)
        with monkeypatch.context() as patched:
            check = guard(patched)
            op(*xs)
        assert check() == 1
        assert all(x is None or torch.equal(x.double(), y) for x, y in zip(xs, kept, strict=True))


def test_non_contiguous_inputs_are_read_right(compiled):
    for op, _, xs in cases(2, 3, 2, 16):
        strided = [x if x is None else torch.stack((x, x), -1)[..., 1] for x in xs]
        for got, want in zip(results(op(*strided)), results(op(*xs)), strict=True):
            assert torch.equal(got, want)


def test_gradients_are_the_reference_s():
    for op, _, xs in cases(1, 2, 2, 3):
        given = [x for x in xs if x is not None]
        exact = [x.double().requires_grad_() for x in given]

        def call(*ys, op=op, xs=xs):
            ys = iter(ys)
            return op(*(None if x is None else next(ys) for x in xs))

        assert torch.autograd.gradcheck(call, exact)
        assert results(call(given[0].requires_grad_(), *given[1:]))[0].requires_grad


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_other_devices_are_left_to_torch(device):
    for op, _, xs in cases(1, 2, 2, 3):
        y = op(*(None if x is None else x.to(device) for x in xs))
        assert results(y)[0].device.type == device


def test_without_the_library_and_for_mixed_precision(monkeypatch):
    for op, reference, xs in cases(1, 2, 2, 16):
        mixed = [xs[0].bfloat16(), *xs[1:]]
        assert all(torch.equal(x, y) for x, y in zip(results(op(*mixed)), results(reference(*mixed)), strict=True))
        with monkeypatch.context() as patched:
            patched.setattr(build, "library", lambda: None)
            assert all(torch.equal(x, y) for x, y in zip(results(op(*xs)), results(reference(*xs)), strict=True))


def test_compiles():
    for op, _, xs in cases(1, 2, 2, 16):
        fused = torch.compile(op, backend="aot_eager", fullgraph=True)
        for got, want in zip(results(fused(*xs)), results(op(*xs)), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (33,), (2, 3, 16), (70000,)], ids=str)
def test_relu_squared(shape, dtype, library, monkeypatch):
    if not library:
        monkeypatch.setattr(build, "library", lambda: None)
    whole = torch.randn(128 + torch.Size(shape).numel(), generator=torch.Generator().manual_seed(0)).to(dtype)
    kept, x = whole.clone(), whole[64:-64].view(shape)
    y = relu_squared(x)  # gradients are recorded: someone may have kept x
    assert torch.equal(whole, kept)
    assert torch.equal(y, torch.relu(x) ** 2)
    with torch.no_grad():
        assert relu_squared(x) is x
    assert torch.equal(x, y)
    assert torch.equal(whole[:64], kept[:64])
    assert torch.equal(whole[-64:], kept[-64:])
    nan = torch.full((20,), torch.nan, dtype=dtype)
    with torch.no_grad():
        assert relu_squared(nan).isnan().all()


def test_relu_squared_has_a_gradient():
    assert torch.autograd.gradcheck(relu_squared, torch.randn(20, dtype=torch.float64).requires_grad_())
