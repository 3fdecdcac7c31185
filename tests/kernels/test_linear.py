import pytest
import torch
from parity import assert_parity
from sentinels import guard

from kernels import build
from kernels import linear as module
from kernels.linear import ROWS, linear, linear_reference, low_rank, low_rank_reference

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    (1, 1, 3),
    (1, 5, 3),
    (1, 16, 16),
    (1, 768, 100),
    (2, 33, 70),
    (3, 64, 17),
    (4, 100, 31),
    (5, 40, 16),
    (8, 257, 65),
]
ACTIVATIONS = ["none", "tanh", "sigmoid"]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(size, rank, out, dtype=torch.float32):
    """down, up, bias"""
    return (
        draw(size, rank, dtype=dtype, seed=1) / size**0.5,
        draw(rank, out, dtype=dtype, seed=2),
        draw(1, 1, out, dtype=dtype),
    )


@pytest.fixture
def compiled(monkeypatch):
    """Forbids the way through torch."""
    for name in ("linear_reference", "low_rank_reference"):
        monkeypatch.setattr(f"kernels.linear.{name}", lambda *_: pytest.fail("left to torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size", "out"), SHAPES)
def test_linear_matches_reference(rows, size, out, stored, dtype, compiled):
    x, weight = draw(rows, size, dtype=dtype), draw(out, size, dtype=stored, seed=1)
    y = linear(x, weight)
    assert y.dtype == dtype
    assert_parity("y", y, linear_reference(x, weight), linear_reference(x.double(), weight.double()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size", "out"), SHAPES)
@pytest.mark.parametrize("rank", [6, 32, 70])
def test_low_rank_matches_reference(rank, rows, size, out, stored, dtype, activation, compiled):
    x, weights = draw(rows, size, dtype=dtype), pair(size, rank, out, stored)
    for given in (weights, weights[:2]):
        y = low_rank(x, *given, activation=activation)
        assert y.dtype == dtype
        slow = low_rank_reference(x, *given, activation=activation)
        exact = low_rank_reference(x.double(), *(w.double() for w in given), activation=activation)
        assert_parity("y", y, slow, exact)


@pytest.mark.parametrize("lead", [(), (3,), (1, 1), (2, 1), (2, 2, 2)], ids=str)
def test_any_leading_shape(lead, compiled):
    x, weight, weights = draw(*lead, 24), draw(7, 24, seed=1), pair(24, 6, 10)
    torch.testing.assert_close(linear(x, weight), x @ weight.mT)
    torch.testing.assert_close(low_rank(x, *weights), x @ weights[0] @ weights[1] + weights[2].view(-1))
    assert low_rank(x, *weights).shape == (*lead, 10)


def test_non_contiguous_inputs_are_read_right(compiled):
    x, weight = draw(40, 3).mT, draw(40, 20, seed=1).mT
    torch.testing.assert_close(linear(x, weight), x @ weight.mT)
    torch.testing.assert_close(linear(x[:, ::2], weight[:, ::2]), x[:, ::2] @ weight[:, ::2].mT)
    down, up, bias = pair(40, 6, 20)
    down, up, bias = down.mT.contiguous().mT, up.mT.contiguous().mT, bias.expand(2, 1, 20)[:1]
    torch.testing.assert_close(low_rank(x, down, up, bias), x @ down @ up + bias.view(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_writes_all_and_nothing_past_the_ends(shape, dtype, monkeypatch):
    rows, size, out = shape
    x, weight, weights = draw(rows, size, dtype=dtype), draw(out, size), pair(size, 5, out)
    kept = [x.clone(), weight.clone()]
    check = guard(monkeypatch)
    linear(x, weight)
    low_rank(x, *weights)
    assert check() == 2
    assert torch.equal(x, kept[0])
    assert torch.equal(weight, kept[1])


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_a_bit(threads, monkeypatch):
    x, weight, weights = draw(2, 300), draw(200, 300), pair(300, 33, 170)
    want = linear(x, weight), low_rank(x, *weights)
    monkeypatch.setattr(build, "threads", lambda: threads)
    got = linear(x, weight), low_rank(x, *weights)
    assert all(torch.equal(y, w) for y, w in zip(got, want, strict=True))


def test_gradients_and_many_rows_are_left_to_torch():
    x, weight, weights = draw(2, 6, dtype=torch.float64), draw(5, 6, dtype=torch.float64), pair(6, 3, 5, torch.float64)
    xs = [t.requires_grad_() for t in (x, weight, *weights)]
    assert torch.autograd.gradcheck(linear, xs[:2])
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda x, *w, a=activation: low_rank(x, *w, activation=a), (xs[0], *xs[2:]))
    x, weight = draw(2, 6), draw(5, 6).requires_grad_()
    assert linear(x, weight).requires_grad
    with torch.no_grad():
        assert torch.equal(linear(x, weight), linear(x, weight.detach()))
    many = draw(ROWS + 1, 6)
    assert torch.equal(linear(many, weight), many @ weight.mT)
    assert linear(many[:0], weight).shape == (0, 5)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_many_rows_of_bfloat16(stored, native, monkeypatch):
    monkeypatch.setattr(module, "_WIDENED", 100)
    monkeypatch.setattr(module, "slow_in", lambda x: not native)
    x, weight, weights = draw(2, 10, 24, dtype=torch.bfloat16), draw(70, 24, dtype=stored), pair(24, 5, 70, stored)
    exact = x.double(), weight.double(), [w.double() for w in weights]
    y, z = linear(x, weight), low_rank(x, *weights)
    assert y.dtype == z.dtype == torch.bfloat16
    assert_parity("linear", y, linear_reference(x, weight), linear_reference(*exact[:2]))
    assert_parity("low rank", z, low_rank_reference(x, *weights), low_rank_reference(exact[0], *exact[2]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_under_gradients_rounds_once(dtype, activation):
    """Outputs and gradients as good as those of separate operations."""
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(2, 10, 70, generator=generator).to(dtype)

    def apart(x, down, up, bias):
        return module._ACTIVATIONS[activation](x @ down) @ up + bias.view(-1)

    def run(op, wide=False):
        xs = [draw(2, 10, 24, dtype=dtype), *pair(24, 5, 70, dtype)]
        xs = [(x.double() if wide else x).requires_grad_() for x in xs]
        y = op(*xs)
        return y.detach(), *torch.autograd.grad(y, xs, cotangent.to(y.dtype))

    results = run(lambda *xs: low_rank(*xs, activation=activation)), run(apart), run(apart, wide=True)
    for name, *ys in zip(("y", "dx", "ddown", "dup", "dbias"), *results, strict=True):
        assert_parity(name, *ys)


def test_only_bfloat16_is_widened():
    assert not module.slow_in(torch.zeros(1))
    assert module.slow_in(torch.zeros(1, dtype=torch.bfloat16)) in (False, True)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_other_devices_are_left_to_torch(device):
    x, weight, weights = (
        draw(1, 6).to(device), draw(5, 6).to(device), [w.to(device) for w in pair(6, 3, 5)]
    )  # fmt: skip
    assert linear(x, weight).device == low_rank(x, *weights).device == x.device


def test_without_the_library(monkeypatch):
    x, weight, weights = draw(2, 30), draw(20, 30), pair(30, 4, 20)
    monkeypatch.setattr(build, "library", lambda *_: None)
    assert torch.equal(linear(x, weight), linear_reference(x, weight))
    assert torch.equal(low_rank(x, *weights, activation="tanh"), low_rank_reference(x, *weights, activation="tanh"))


def test_compiles_and_heeds_autocast():
    x, weight, weights = draw(2, 30), draw(20, 30), pair(30, 4, 20)

    def both(x):
        return linear(x, weight), low_rank(x, *weights)

    want = both(x)
    for got, y in zip(torch.compile(both, backend="aot_eager", fullgraph=True)(x), want, strict=True):
        torch.testing.assert_close(got, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        assert low_rank(x, *weights).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call",
    [
        lambda: linear(draw(1, 5), draw(3, 6)),
        lambda: low_rank(draw(1, 5), draw(6, 2), draw(2, 3)),
        lambda: low_rank(draw(1, 6), draw(6, 2), draw(3, 3)),
        lambda: low_rank(draw(1, 6), draw(6, 2), draw(2, 3), draw(4)),
        lambda: low_rank(draw(2, 3), draw(6, 2), draw(2, 3)),
    ],
)
def test_refuses_what_does_not_fit(call):
    with pytest.raises(
        ValueError, match=r"weight is \(3, 6\); for x \(1, 5\)|down \(6, 2\), up .* do not fit together"
    ):
        call()
