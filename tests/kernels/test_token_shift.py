import pytest
import torch
from parity import assert_parity
from sentinels import guard

from kernels import build
from kernels.token_shift import Norm, mix, mix_reference

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 1), (1, 1, 768), (2, 1, 17), (3, 5, 16), (1, 16, 33), (2, 33, 40), (1, 100, 64)]


def draw(batch, steps, channels, mixes=6, dtype=torch.float32, stored=None, normed=True):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    stored = stored or dtype
    mus = [randn(1, 1, channels, dtype=stored) for _ in range(mixes)]
    norm = Norm(randn(channels, dtype=stored), randn(channels, dtype=stored), 1e-5) if normed else None
    return 3 + 2 * randn(batch, steps, channels), randn(batch, channels), mus, norm


def double(x, last, mus, norm):
    exact = norm and Norm(norm.weight.double(), norm.bias.double(), norm.eps)
    return x.double(), last.double(), [mu.double() for mu in mus], exact


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr("kernels.token_shift.mix_reference", lambda *_: pytest.fail("left to torch"))


@pytest.mark.parametrize("normed", [False, True], ids=["as it is", "normed"])
@pytest.mark.parametrize("mixes", [1, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, mixes, normed, compiled):
    given = draw(*shape, mixes, dtype, normed=normed)
    fast, slow, exact = mix(*given), mix_reference(*given), mix_reference(*double(*given))
    assert len(fast[0]) == mixes
    for name, *zs in zip(("z", "last"), (fast[0], fast[1:]), (slow[0], slow[1:]), (exact[0], exact[1:]), strict=True):
        for got, want, truth in zip(*zs, strict=True):
            assert got.dtype == dtype
            assert_parity(name, got, want, truth)


def test_parameters_may_have_another_precision_than_activations(compiled):
    given = draw(2, 20, 40, stored=torch.bfloat16)
    exact = mix_reference(*double(*given))
    torch.testing.assert_close(torch.stack(mix(*given)[0]).double(), torch.stack(exact[0]), rtol=1e-4, atol=1e-4)


def test_is_its_formula():
    x, last, (mu,), _ = draw(1, 3, 4, 1, normed=False)
    (z,), end = mix(x, last, [mu])
    before = [last[0], x[0, 0], x[0, 1]]
    for t in range(3):
        torch.testing.assert_close(z[0, t], x[0, t] + (before[t] - x[0, t]) * mu[0, 0])
    assert torch.equal(end, x[:, -1])


@pytest.mark.parametrize("at", [1, 15, 16, 20])
def test_slices_with_carried_tokens_equal_the_whole(at, compiled):
    x, last, mus, norm = draw(2, 40, 24)
    whole, end = mix(x, last, mus, norm)
    first, between = mix(x[:, :at], last, mus, norm)
    second, after = mix(x[:, at:], between, mus, norm)
    for a, b, want in zip(first, second, whole, strict=True):
        assert torch.equal(torch.cat((a, b), 1), want)
    assert torch.equal(after, end)


def test_non_contiguous_inputs_are_read_right(compiled):
    x, last, mus, norm = draw(2, 20, 24)
    strided = x.mT.contiguous().mT, last.mT.contiguous().mT, [mu.repeat(1, 1, 2)[..., 24:] for mu in mus], norm
    wide = [torch.stack((mu, mu), -1)[..., 0] for mu in mus]
    assert not wide[0].is_contiguous()
    for got in (mix(*strided), mix(x, last, wide, norm)):
        for z, want in zip((*got[0], got[1]), (*mix(x, last, mus, norm)[0], mix(x, last, mus, norm)[1]), strict=True):
            assert torch.equal(z, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_all_and_nothing_past_the_ends(shape, dtype, monkeypatch):
    given = draw(*shape, dtype=dtype)
    kept = double(*given)
    check = guard(monkeypatch)
    mix(*given)
    assert check() == 2
    assert torch.equal(given[0].double(), kept[0])
    assert torch.equal(given[1].double(), kept[1])


def test_gradients_are_the_reference_s():
    x, last, mus, norm = double(*draw(2, 3, 4, 2))
    xs = [y.requires_grad_() for y in (x, last, *mus, *norm[:2])]

    def op(x, last, a, b, weight, bias):
        z, end = mix(x, last, [a, b], Norm(weight, bias, 1e-5))
        return *z, end

    assert torch.autograd.gradcheck(op, xs)
    x, last, mus, norm = draw(2, 3, 4, 2)
    assert mix(x, last, [mus[0].requires_grad_(), mus[1]], norm)[0][0].requires_grad


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_other_devices_are_left_to_torch(device):
    x, last, mus, norm = draw(2, 3, 4, 2)
    z, _ = mix(
        x.to(device), last.to(device), [mu.to(device) for mu in mus], Norm(*(p.to(device) for p in norm[:2]), 1e-5)
    )
    assert z[0].device.type == device


def test_without_the_library(monkeypatch):
    given = draw(2, 3, 4, 2)
    monkeypatch.setattr(build, "library", lambda: None)
    assert all(torch.equal(x, y) for x, y in zip(mix(*given)[0], mix_reference(*given)[0], strict=True))


def test_compiles():
    given = draw(2, 3, 4, 2)
    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(*given)[0], mix(*given)[0], strict=True):
        torch.testing.assert_close(got, want)


def test_refuses_what_does_not_fit():
    x, last, mus, norm = draw(2, 3, 4, 7)
    with pytest.raises(ValueError, match="at most 6 mixes"):
        mix(x, last, mus, norm)
    with pytest.raises(ValueError, match=r"last is \(1, 4\)"):
        mix(x, last[:1], mus[:6], norm)
    with pytest.raises(ValueError, match=r"the parameters \[\(3,\)\] for x \(2, 3, 4\)"):
        mix(x, last, [mus[0][0, 0, :3]])
