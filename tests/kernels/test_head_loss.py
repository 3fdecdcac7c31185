import pytest
import torch
from parity import assert_parity

from kernels import head_loss as module
from kernels.head_loss import IGNORE, ROWS, head_loss, head_loss_reference, token_nll

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = ("loss", "dhidden", "dweight")


def draw(rows, channels=16, vocab=97, dtype=torch.float32, device="cpu", ignored=0.3):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, channels, generator=generator).to(device, dtype)
    weight = torch.randn(vocab, channels, generator=generator).to(device, dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets.to(device)


def run(op, hidden, weight, targets, l2_wrap=0.0, scale=-1.7):
    """Loss and both gradients under an upstream gradient that is neither 1 nor positive."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = op(hidden, weight, targets, l2_wrap)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("l2_wrap", [0.0, 1e-2])
@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 17])
def test_matches_reference(rows, l2_wrap, dtype, device):
    xs = draw(rows, dtype=dtype, device=device)
    if (xs[2] == IGNORE).all():
        xs[2][0] = 5
    fast, slow = run(head_loss, *xs, l2_wrap), run(head_loss_reference, *xs, l2_wrap)
    exact = run(head_loss_reference, xs[0].double(), xs[1].double(), xs[2], l2_wrap)
    assert fast[0].dtype == torch.float32
    for name, got, want, truth in zip(NAMES, fast, slow, exact, strict=True):
        assert_parity(name, got, want, truth)


@pytest.mark.parametrize("l2_wrap", [0.0, 1e-2])
def test_matches_finite_differences(l2_wrap):
    """Independently of the reference: L2Wrap is no part of the loss, so its pull is checked by its definition."""
    hidden, weight, targets = draw(5, channels=3, vocab=7)
    _, dhidden, dweight = run(head_loss, hidden, weight, targets, l2_wrap, scale=1.0)
    h, w = hidden.double(), weight.double()
    z = h @ w.T
    dz = torch.softmax(z, 1)
    for row, target in enumerate(targets.tolist()):
        if target == IGNORE:
            dz[row] = 0
        else:
            dz[row, target] -= 1
            dz[row, z[row].argmax()] += l2_wrap * z[row].max()
    torch.testing.assert_close(dhidden.double(), dz @ w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dweight.double(), dz.T @ h, rtol=1e-5, atol=1e-5)


def test_l2_wrap_changes_the_gradient_and_not_the_loss():
    xs = draw(70)
    plain, pulled = run(head_loss, *xs), run(head_loss, *xs, 1e-2)
    assert torch.equal(plain[0], pulled[0])
    assert not torch.equal(plain[1], pulled[1])


def test_nothing_to_learn_is_zero():
    hidden, weight, targets = draw(ROWS + 3)
    targets[:] = IGNORE
    for result in run(head_loss, hidden, weight, targets, 1e-2):
        assert torch.equal(result, torch.zeros_like(result))


def test_no_rows_are_zero():
    for result in run(head_loss, *draw(0)):
        assert torch.equal(result, torch.zeros_like(result))
    hidden, weight, targets = draw(0)
    assert token_nll(hidden, weight, targets).shape == (0,)


def test_what_is_ignored_does_not_matter():
    hidden, weight, targets = draw(ROWS + 3)
    other = torch.where((targets == IGNORE)[:, None], torch.full_like(hidden, 1e4), hidden)
    (loss, _, dweight), (same, _, gradient) = (run(head_loss, h, weight, targets) for h in (hidden, other))
    assert torch.equal(loss, same)
    assert torch.equal(dweight, gradient)


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest storage that an operation makes, beside those that were `there` before."""

    def __init__(self, *there):
        super().__init__()
        self.there = {x.untyped_storage().data_ptr() for x in there}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.there:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(("trained", "limit"), [(False, ROWS * 4000 * 4), (True, 4000 * 128 * 4)])
def test_a_frozen_weight_costs_nothing(trained, limit):
    """Neither a gradient nor its memory; and the logits of all rows never stand at once."""
    hidden, weight, targets = draw(8 * ROWS, channels=128, vocab=4000)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    with Allocations(hidden, weight) as seen:
        head_loss(hidden, weight, targets).backward()
    assert (weight.grad is not None) == trained
    assert hidden.grad is not None
    assert seen.largest <= limit


def test_only_the_weight_is_trained():
    hidden, weight, targets = draw(ROWS + 3)
    _, _, want = run(head_loss, hidden, weight, targets)
    weight.requires_grad_()
    (-1.7 * head_loss(hidden, weight, targets)).backward()
    assert torch.equal(weight.grad, want)


def test_token_nll_is_the_cross_entropy_of_each_position():
    hidden, weight, targets = draw(2 * ROWS + 5)
    nll = token_nll(hidden, weight, targets)
    log_p = torch.log_softmax(hidden.double() @ weight.double().T, 1)
    for row, target in enumerate(targets.tolist()):
        want = 0.0 if target == IGNORE else -log_p[row, target].item()
        assert nll[row].item() == pytest.approx(want, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(nll.sum(), head_loss(hidden, weight, targets))


@pytest.mark.parametrize("op", [head_loss, token_nll])
def test_refuses_what_does_not_fit(op):
    hidden, weight, targets = draw(4)
    with pytest.raises(ValueError, match=r"weight is \(97, 15\) .* must be \(V, 16\) and \(4,\); flatten"):
        op(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"targets \(3,\) for hidden \(4, 16\)"):
        op(hidden, weight, targets[1:])


def test_blocks_do_not_matter(monkeypatch):
    xs = draw(150)
    whole = run(head_loss, *xs, 1e-2)
    monkeypatch.setattr(module, "ROWS", 7)
    for got, want in zip(run(head_loss, *xs, 1e-2), whole, strict=True):
        torch.testing.assert_close(got, want)
