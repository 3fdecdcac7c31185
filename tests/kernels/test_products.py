"""Products by oneDNN, asked for on whatever processor this is: what torch gives there is the reference."""

import pytest
import torch
from parity import assert_parity

from kernels import head_loss, products
from kernels.products import linear, product, put

needed = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)
EACH_OF_THREE = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
SHAPES = [(1, 1, 1), (5, 3, 7), (16, 64, 33), (65, 17, 128), (130, 257, 96)]


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Small ones too, and here; says how many there were."""
    calls = []
    own = products._fast

    def counted(*given):
        calls.append(given)
        return own(*given)

    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(products, "_on_this_processor", lambda: True)
    monkeypatch.setattr(products, "_fast", counted)
    return calls


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def strided(x, kind):
    """The same values, in other places."""
    if kind == "transposed":
        return x.mT.contiguous().mT
    if kind == "a part":
        wide = torch.full((x.shape[0] + 2, x.shape[1] + 3), torch.nan)
        wide[1:-1, 2:-1] = x
        return wide[1:-1, 2:-1]
    return x


def all_alike(found, slow, exact):
    for i, (x, y, z) in enumerate(zip(found, slow, exact, strict=True)):
        assert_parity(f"output or gradient {i}", x, y, z)


@needed
@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("kinds", [("as it is", "as it is"), ("transposed", "a part"), ("a part", "transposed")])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(shape, kinds, alpha, asked):
    m, k, n = shape
    x, y = draw(m, k), draw(k, n, seed=1)
    found = product(strided(x, kinds[0]), strided(y, kinds[1]), alpha)
    assert len(asked) == 1
    assert_parity("product", found, alpha * (x @ y), alpha * (x.double() @ y.double()))


@needed
@pytest.mark.parametrize(("rows", "columns"), [(9, 31), (9, 64), (9, 200), (200, 9), (130, 9)])
@pytest.mark.parametrize(("beta", "alpha"), [(0.0, 1.0), (0.0, 2.0), (1.0, 1.0), (1.0, 0.25), (0.5, -2.0)])
def test_put(beta, alpha, rows, columns, asked, monkeypatch):
    monkeypatch.setattr(products, "_AT_ONCE", 9 * 64)
    x, y, before = draw(rows, 20), draw(20, columns, seed=1), draw(rows, columns, seed=2)
    into = torch.full((rows, columns + 9), 7.0)
    out = into[:, 5:-4]
    out.copy_(before if beta else torch.full_like(before, torch.nan))  # beta 0 does not read it
    put(out, x, y, beta=beta, alpha=alpha)
    assert len(asked) == -(-max(rows, columns) // 64)
    wanted = beta * before.double() + alpha * (x.double() @ y.double())
    assert_parity("put", out, beta * before + alpha * (x @ y), wanted)
    assert (into[:, :5] == 7).all()
    assert (into[:, -4:] == 7).all()


@needed
@pytest.mark.parametrize("trained", [*EACH_OF_THREE, (True, True), (True, False), (False, True)])
def test_linear_and_every_gradient(trained, asked):
    """Of x, weight and, in triples, bias."""
    given = [draw(3, 5, 12), draw(20, 12, seed=1), draw(20, seed=2)][: len(trained)]
    dy = draw(3, 5, 20, seed=3)

    def all_of(call, dtype):
        xs = [x.to(dtype).clone().requires_grad_(wants) for x, wants in zip(given, trained, strict=True)]
        y = call(*xs)
        return [y, *torch.autograd.grad(y, [x for x in xs if x.requires_grad], dy.to(dtype))]

    found = all_of(linear, torch.float32)
    assert len(asked) == 1 + sum(trained[:2])
    plain = torch.nn.functional.linear
    all_alike(found, all_of(plain, torch.float32), all_of(plain, torch.float64))


@needed
def test_linear_keeps_no_more_for_the_backward_than_torch():
    def kept(call, *, x, weight):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            call(draw(4, 6).requires_grad_(x), draw(5, 6, seed=1).requires_grad_(weight), None)
        return sorted(sizes)

    for x, weight in [(True, False), (False, True), (True, True)]:
        assert kept(linear, x=x, weight=weight) == kept(torch.nn.functional.linear, x=x, weight=weight)


@needed
@pytest.mark.parametrize("l2_wrap", [0.0, 1e-2])
def test_head_and_loss(l2_wrap, asked):
    hidden, weight = draw(13, 8).requires_grad_(), draw(50, 8, seed=1).requires_grad_()
    targets = torch.randint(0, 50, (13,), generator=torch.Generator().manual_seed(2))
    targets[4] = head_loss.IGNORE

    def all_of(call, dtype):
        xs = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = call(*xs, targets, l2_wrap)
        return [loss, *torch.autograd.grad(loss, xs)]

    found = all_of(head_loss.head_loss, torch.float32)
    assert len(asked) > 2
    reference = head_loss.head_loss_reference
    all_alike(found, all_of(reference, torch.float32), all_of(reference, torch.float64))


def test_all_else_is_torchs(asked):
    """Other dtypes, autocast, and what is traced."""
    x, y = draw(4, 5, dtype=torch.float64), draw(5, 6, dtype=torch.float64)
    assert torch.equal(product(x, y), x @ y)
    assert torch.equal(linear(x, y.mT), x @ y)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x.float(), y.mT.float()).dtype is torch.bfloat16
    torch.testing.assert_close(torch.compile(linear, backend="eager")(x.float(), y.mT.float()), x.float() @ y.float())
    with torch.device("meta"):
        assert linear(torch.empty(4, 5), torch.empty(6, 5)).shape == (4, 6)
    assert not asked


def test_small_products_are_torchs(asked, monkeypatch):
    monkeypatch.setattr(products, "SMALL", 4 * 5 * 6 + 1)
    product(draw(4, 5), draw(5, 6))
    assert not asked


@needed
@pytest.mark.parametrize("kind", ["as it is", "transposed", "a part"])
def test_no_product_is_left_to_the_reference_of_onednn(kind, monkeypatch, capfd):
    monkeypatch.setattr(products, "_AT_ONCE", 16 * 64)
    x, y = strided(draw(64, 32), kind), strided(draw(32, 160, seed=1), kind)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        product(x, y)
        product(y.mT, x.mT)
        put(torch.empty(64, 160), x, y)  # parts of the columns
        put(torch.empty(160, 64), y.mT, x.mT)  # of the rows
        put(torch.empty(16, 160), x[:16], y, beta=0.0, alpha=2.0)
        linear(x, y.mT)
    said = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert len(said) >= 6
    assert not [line for line in said if ",ref" in line]
