import math
from functools import partial

import pytest
import torch
from parity import assert_parity
from recurrence import DEVICES, Where, param

from kernels import build
from kernels import head_loss as module
from kernels.head_loss import IGNORE, apply, head_loss, head_loss_reference, token_nll

NAMES = ("loss", "dhidden", "dweight")
ROWS = 8  # of a block of these tests, with VOCAB logits each

WHERE = [
    Where("torch", "cpu"),
    Where("cpu", "cpu"),
    Where("triton", "cpu"),
    Where("torch", "cuda"),
    Where("triton", "cuda"),
]
everywhere = pytest.mark.parametrize("where", [param(where) for where in WHERE])

VOCAB = 97


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of a few rows, and of a few weights in another dtype; and a program of Triton goes over a row in several parts."""
    from kernels import head_loss_triton

    monkeypatch.setattr(module, "LOGITS", ROWS * VOCAB * 4)
    monkeypatch.setattr(module, "CONVERTED", 16 * 40)
    monkeypatch.setattr(head_loss_triton, "BLOCK", 32)


def draw(rows, channels=16, vocab=VOCAB, dtype=torch.float32, device="cpu", ignored=0.3):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, channels, generator=generator).to(device, dtype)
    weight = torch.randn(vocab, channels, generator=generator).to(device, dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets.to(device)


def weights(rows, device="cpu"):
    generator = torch.Generator().manual_seed(rows + 1)
    return (3 * torch.rand(rows, generator=generator) - 0.5).clamp(min=0).to(device)


def run(op, hidden, weight, targets, *others, scale=-1.7):
    """Loss and both gradients under an upstream gradient that is neither 1 nor positive."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = op(hidden, weight, targets, *others)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


def compare(op, xs, *others):
    """That `op` is as good as the reference."""
    fast, slow = run(op, *xs, *others), run(head_loss_reference, *xs, *others)
    exact = run(head_loss_reference, xs[0].double(), xs[1].double(), xs[2], *others)
    assert fast[0].dtype == torch.float32
    for name, got, want, truth in zip(NAMES, fast, slow, exact, strict=True):
        assert got.dtype == want.dtype, name
        assert_parity(name, got, want, truth)


def by_definition(hidden, weight, targets, l2_wrap=0.0, token_weight=None):
    """Loss and gradients in float64, element by element: L2Wrap is no part of the loss, so no reference's autograd shows it."""
    h, w = hidden.double().cpu(), weight.double().cpu()
    z = h @ w.T
    dz = torch.softmax(z, 1)
    loss = 0.0
    for row, target in enumerate(targets.tolist()):
        each = 1.0 if token_weight is None else token_weight[row].item()
        if target == IGNORE or not each:
            dz[row] = 0
            continue
        loss -= each * torch.log_softmax(z[row], 0)[target].item()
        dz[row, target] -= 1
        dz[row, z[row].tolist().index(z[row].max())] += l2_wrap * z[row].max()
        dz[row] *= each
    return torch.tensor(loss, dtype=torch.float64), dz @ w, dz.T @ h


def assert_by_definition(op, *xs):
    for name, got, want in zip(NAMES, run(op, *xs, scale=1.0), by_definition(*xs), strict=True):
        torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("l2_wrap", [0.0, 1e-2])
@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS + 4, 5 * ROWS + 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_reference(weighted, rows, l2_wrap, dtype, where):
    xs = draw(rows, dtype=dtype, device=where.device)
    xs[2][0] = 5
    given = weights(rows, where.device) if weighted else None
    if weighted:
        given[0] = 0.7
    compare(partial(apply, where.form), xs, l2_wrap, given)


@everywhere
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 33, 1023, 1024 + 64, 3000])
def test_any_vocabulary(vocab, where):
    compare(partial(apply, where.form), draw(5, vocab=vocab, device=where.device, ignored=0.0), 1e-2)


@everywhere
def test_matches_its_definition(where):
    xs = draw(11, channels=3, vocab=7, device=where.device)
    for l2_wrap, token_weight in ((0.0, None), (1e-2, None), (1e-2, weights(11, where.device))):
        assert_by_definition(partial(apply, where.form), *xs, l2_wrap, token_weight)


@everywhere
@pytest.mark.parametrize("places", [(0, 1), (15, 16), (31, 96), (3, 40, 95), tuple(range(VOCAB))])
def test_the_first_of_equal_logits_is_pulled(places, where):
    hidden, weight, targets = draw(3, device=where.device, ignored=0.0)
    hidden = (4 * hidden).round()  # of whole numbers, equal ones have equal logits in whatever order they are summed
    weight[list(places)] = 2 * hidden.sum(0)
    targets[0], targets[1] = places[0], places[-1]
    assert_by_definition(partial(apply, where.form), hidden, weight, targets, 0.5)


@everywhere
def test_the_first_of_equal_logits_far_apart(where):
    hidden, weight, targets = draw(2, vocab=3000, device=where.device, ignored=0.0)
    hidden = (4 * hidden).round()
    weight[[1020, 1030, 2999]] = 2 * hidden.sum(0)
    assert_by_definition(partial(apply, where.form), hidden, weight, targets, 0.5)


@everywhere
def test_the_largest_is_taken_off_first(where):
    """log(sum) + 1e4 would have lost all that follows the third digit of the sum's logarithm."""
    z = 1e4 + torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(where.device)
    targets, nll = z.argmax(1), z.new_empty(4)
    want = -torch.log_softmax(z.double(), 1).gather(1, targets[:, None])[:, 0]
    module._fused(where.form)(z, targets, None, 0.0, nll, False)
    torch.testing.assert_close(nll.double(), want, rtol=1e-5, atol=0)


@everywhere
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits(size, where):
    """Near 1e4 the largest must be taken off before anything else; and a p of 0 makes nothing infinite."""
    hidden, weight, targets = draw(6, device=where.device, ignored=0.0)
    xs = hidden * (size / (hidden @ weight.mT).amax()), weight, targets
    targets[0], targets[1] = (xs[0] @ weight.mT)[:2].argmax(1)
    compare(partial(apply, where.form), xs, 1e-2)
    assert all(x.isfinite().all() for x in run(partial(apply, where.form), *xs, 1e-2))


@everywhere
def test_what_is_no_number_is_not_hidden(where):
    hidden, weight, targets = draw(4, device=where.device, ignored=0.0)
    weight[5] = math.nan
    assert all(x.isnan().any() for x in run(partial(apply, where.form), hidden, weight, targets, 1e-2))


def test_l2_wrap_changes_the_gradient_and_not_the_loss():
    xs = draw(70)
    plain, pulled = run(head_loss, *xs), run(head_loss, *xs, 1e-2)
    assert torch.equal(plain[0], pulled[0])
    assert not torch.equal(plain[1], pulled[1])


@everywhere
def test_nothing_to_learn_is_zero(where):
    hidden, weight, targets = draw(ROWS + 3, device=where.device)
    nothing = torch.zeros(ROWS + 3, device=where.device)
    for given, each in ((torch.full_like(targets, IGNORE), None), (targets, nothing)):
        for result in run(partial(apply, where.form), hidden, weight, given, 1e-2, each):
            assert torch.equal(result, torch.zeros_like(result))


def test_no_rows_are_zero():
    for result in run(head_loss, *draw(0)):
        assert torch.equal(result, torch.zeros_like(result))
    assert token_nll(*draw(0)).shape == (0,)


@everywhere
def test_what_is_ignored_does_not_matter(where):
    hidden, weight, targets = draw(ROWS + 3, device=where.device)
    other = torch.where((targets == IGNORE)[:, None], torch.full_like(hidden, 1e4), hidden)
    op = partial(apply, where.form)
    (loss, _, dweight), (same, _, gradient) = (run(op, h, weight, targets) for h in (hidden, other))
    assert torch.equal(loss, same)
    assert torch.equal(dweight, gradient)


def test_a_weight_of_0_is_as_ignored_and_one_of_1_as_none():
    hidden, weight, targets = draw(40)
    op = partial(head_loss, l2_wrap=1e-2)
    learned = targets != IGNORE
    everything = targets.clamp(min=0)
    want = run(op, hidden, weight, targets)
    weighted = partial(op, token_weight=learned.float())
    for got in (run(weighted, hidden, weight, everything), run(weighted, hidden, weight, targets)):
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


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


@pytest.mark.parametrize("form", ["cpu", "torch"])
@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_weight_costs_nothing(trained, dtype, stored, form, monkeypatch):
    """Neither a gradient nor its memory; and neither the logits of all rows nor all weights in another dtype ever stand."""
    block = 64 * 4000 * 4
    monkeypatch.setattr(module, "LOGITS", block)
    hidden, weight, targets = draw(512, channels=128, vocab=4000)
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(stored).requires_grad_(trained)
    with Allocations(hidden, weight) as seen:
        apply(form, hidden, weight, targets).backward()
    assert (weight.grad is not None) == trained
    assert hidden.grad is not None
    logits = 2 * block if form == "torch" and dtype == torch.bfloat16 else block  # torch's own are in float32
    assert seen.largest <= (max(logits, 4000 * 128 * 4) if trained else logits)


def test_only_what_is_trained_gets_gradients():
    hidden, weight, targets = draw(ROWS + 3)
    _, dhidden, dweight = run(head_loss, hidden, weight, targets)
    weight.requires_grad_()
    (-1.7 * head_loss(hidden, weight, targets)).backward()
    assert torch.equal(weight.grad, dweight)
    hidden.requires_grad_()
    (-1.7 * head_loss(hidden, weight.detach(), targets)).backward()
    assert torch.equal(hidden.grad, dhidden)
    assert not head_loss(hidden.detach(), weight.detach(), targets).requires_grad
    with torch.no_grad():
        assert not head_loss(hidden, weight, targets).requires_grad


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_of_the_weight_are_trained(where, dtype):
    """They get what they would get if all were, no other needs memory, and all else is as it was."""
    hidden, weight, targets = draw(2 * ROWS + 5, dtype=dtype, device=where.device)
    rows = torch.tensor([VOCAB - 1, 0, 7], device=where.device)
    loss, dhidden, dweight = run(partial(apply, where.form), hidden, weight, targets, 1e-2)
    h, values = hidden.clone().requires_grad_(), weight[rows].float().requires_grad_()
    other = apply(where.form, h, weight, targets, 1e-2, None, rows, values)
    (-1.7 * other).backward()
    assert torch.equal(other, loss)
    assert torch.equal(h.grad, dhidden)
    assert values.grad.dtype == torch.float32
    torch.testing.assert_close(
        values.grad, dweight[rows].float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    reference = weight[rows].clone().requires_grad_()
    (-1.7 * head_loss_reference(hidden, weight, targets, 1e-2, None, rows, reference)).backward()
    torch.testing.assert_close(
        values.grad, reference.grad.float(), rtol=5e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-2
    )


def test_rows_that_do_not_fit_are_refused():
    hidden, weight, targets = draw(4)
    rows, values = torch.tensor([1, 2]), weight[1:3]
    for bad in (
        (None, values),
        (rows, None),
        (rows, values[:1]),
        (rows[:1], values),
        (rows, values[:, 1:]),
        (rows[None], values),
    ):
        with pytest.raises(ValueError, match="train either the weight or some of its rows"):
            head_loss(hidden, weight, targets, rows=bad[0], values=bad[1])
    with pytest.raises(ValueError, match="requires_grad=True"):
        head_loss(hidden, weight.requires_grad_(), targets, rows=rows, values=values)


def test_backward_may_run_twice():
    hidden, weight, targets = draw(ROWS + 3)
    hidden.requires_grad_()
    loss = head_loss(hidden, weight, targets)
    once, twice = (torch.autograd.grad(2 * loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)


@everywhere
def test_token_nll_is_the_cross_entropy_of_each_position(where):
    hidden, weight, targets = draw(2 * ROWS + 5, device=where.device)
    targets[:2] = IGNORE
    nll = module._forward(hidden, weight, targets, None, 0.0, where.form, False, False, None, None)[1]
    log_p = torch.log_softmax(hidden.double() @ weight.double().T, 1)
    for row, target in enumerate(targets.tolist()):
        want = 0.0 if target == IGNORE else -log_p[row, target].item()
        assert nll[row].item() == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_token_nll_sums_to_the_loss():
    xs = draw(2 * ROWS + 5)
    for op in ("auto", "cpu", "torch", "reference"):
        torch.testing.assert_close(token_nll(*xs, op=op).sum(), head_loss(*xs))
    assert token_nll(xs[0].bfloat16(), *xs[1:]).dtype == torch.float32


@pytest.mark.parametrize("op", [head_loss, token_nll])
def test_refuses_what_does_not_fit(op):
    hidden, weight, targets = draw(4)
    with pytest.raises(ValueError, match=r"weight is \(97, 15\) .* must be \(V, 16\) and \(4,\); flatten"):
        op(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"targets \(3,\) for hidden \(4, 16\)"):
        op(hidden, weight, targets[1:])
    for outside in (-1, VOCAB):
        targets[2] = outside
        with pytest.raises(ValueError, match=rf"a target is {outside}; it must be in \[0, 97\), or -100 to ignore it"):
            op(hidden, weight, targets)
    with pytest.raises(ValueError, match=r"op='cpu' for torch.float64 on cpu"):
        op(hidden.double(), weight, targets, op="cpu")
    with pytest.raises(ValueError, match="form='assembler'; it must be one of"):
        apply("assembler", *draw(4, ignored=0.0))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.ones(3), r"token_weight is \(3,\), .* must be \(4,\)"),
        (torch.ones(4, requires_grad=True), r"requires_grad=True; .* detach it"),
        (torch.tensor([1, 1, -0.5, 1]), "a token_weight is -0.5; it must be 0 or more"),
        (torch.tensor([1, 1, 1, math.nan]), "a token_weight is nan; it must be 0 or more"),
    ],
)
def test_refuses_weights_that_are_none(given, said):
    with pytest.raises(ValueError, match=said):
        head_loss(*draw(4), token_weight=given)


def test_auto_takes_the_fastest_that_works(monkeypatch):
    xs = draw(20)
    assert torch.equal(head_loss(*xs), apply("cpu", *xs))
    exact = head_loss(xs[0].double(), *xs[1:])
    assert exact.dtype == torch.float64
    assert torch.equal(exact, apply("torch", xs[0].double(), *xs[1:]))
    monkeypatch.setattr(build, "available", lambda *_: False)
    assert torch.equal(head_loss(*xs), apply("torch", *xs))
    assert torch.equal(head_loss(*xs, op="reference"), head_loss_reference(*xs))


def test_blocks_do_not_matter(monkeypatch):
    xs = draw(150)
    whole = run(head_loss, *xs, 1e-2)
    monkeypatch.setattr(module, "LOGITS", 1 << 20)
    for got, want in zip(run(head_loss, *xs, 1e-2), whole, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("learned", "most", "want"), [(0, 64, 1), (64, 64, 64), (65, 64, 33), (512, 256, 256), (7, 0, 1)]
)
def test_blocks_are_about_equal(learned, most, want, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", most * 4)
    assert module._rows(learned, 4) == want


@everywhere
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_precisions(stored, dtype, native, where, monkeypatch):
    """The products are in hidden's dtype, and each gradient in its own tensor's; a CPU without bfloat16 computes in float32."""
    monkeypatch.setattr(module, "slow_in", lambda x: not native and x.dtype is torch.bfloat16 and x.is_cpu)
    hidden, weight, targets = draw(30, device=where.device)
    hidden, weight = hidden.to(dtype), weight.to(stored)
    compare(partial(apply, where.form), (hidden, weight, targets), 1e-2)
    if not native and where.device == "cpu":
        loss = apply(where.form, hidden, weight, targets)
        assert torch.equal(loss, apply(where.form, hidden.float(), weight.float(), targets))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", ["auto", "reference"])
def test_heeds_autocast(op, device):
    hidden, weight, targets = draw(30, device=device)
    chosen = partial(head_loss, op=op)
    want = run(chosen, hidden.bfloat16(), weight, targets)
    with torch.autocast(device, torch.bfloat16):
        got = run(chosen, hidden, weight, targets)
        nll = token_nll(hidden, weight, targets, op=op)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1].float())
    assert torch.equal(got[2], want[2])
    assert torch.equal(nll, token_nll(hidden.bfloat16(), weight, targets, op=op))


@everywhere
def test_is_a_sound_custom_op(where):
    hidden, weight, targets = draw(20, device=where.device)
    for trained in (True, False):
        xs = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained), targets
        each = weights(20, where.device) if trained else None
        torch.library.opcheck(module._forward.registered, (*xs, each, 1e-2, where.form, True, trained, None, None))
    xs, rows = (hidden.detach().requires_grad_(), weight, targets), torch.tensor([5, 2], device=where.device)
    values = weight[rows].clone().requires_grad_()
    torch.library.opcheck(module._forward.registered, (*xs, None, 1e-2, where.form, True, True, rows, values))


@everywhere
def test_works_under_compile(where):
    xs, each = draw(20, device=where.device), weights(20, where.device)
    op = partial(apply, where.form)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    for got, want in zip(run(compiled, *xs, 1e-2, each), run(op, *xs, 1e-2, each), strict=True):
        assert torch.equal(got, want)


def test_choosing_works_under_compile():
    xs = draw(20)
    compiled = torch.compile(head_loss, backend="aot_eager", fullgraph=True)
    for got, want in zip(run(compiled, *xs, 1e-2), run(head_loss, *xs, 1e-2), strict=True):
        assert torch.equal(got, want)


def test_works_under_checkpointing():
    def checkpointed(*xs):
        return torch.utils.checkpoint.checkpoint(head_loss, *xs, use_reentrant=False)

    xs = draw(20)
    for got, want in zip(run(checkpointed, *xs), run(head_loss, *xs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_a_bit(threads, monkeypatch):
    xs = draw(40)
    want = run(head_loss, *xs, 1e-2)
    monkeypatch.setattr(build, "threads", lambda: threads)
    for x, y in zip(run(head_loss, *xs, 1e-2), want, strict=True):
        assert torch.equal(x, y)


@everywhere
def test_non_contiguous_inputs_are_read_right(where):
    hidden, weight, targets = draw(20, device=where.device)
    each = weights(20, where.device)
    strided = hidden.mT.contiguous().mT, weight.mT.contiguous().mT, torch.stack((targets, targets), 1)[:, 0]
    op = partial(apply, where.form)
    want = run(op, hidden, weight, targets, 1e-2, each)
    for x, y in zip(run(op, *strided, 1e-2, torch.stack((each, each), 1)[:, 0]), want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.fixture
def poisoned():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@everywhere
def test_reads_no_memory_that_it_has_not_written(where, request):
    xs, op = draw(20, device=where.device), partial(apply, where.form)
    clean = run(op, *xs, 1e-2)
    request.getfixturevalue("poisoned")
    for x, y in zip(run(op, *xs, 1e-2), clean, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("form", ["cpu", "triton"])
@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("vocab", [1, 17, 64, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_all_of_its_results_and_nothing_past_their_ends(dtype, vocab, wants, form):
    hidden, weight, targets = draw(5, vocab=vocab, dtype=dtype, ignored=0.0)
    logits = hidden @ weight.mT
    wholes = [torch.full((64 + size + 64,), 77.0, dtype=d) for size, d in ((5 * vocab, dtype), (5, torch.float32))]
    z, nll = (whole[64:-64] for whole in wholes)
    z, nll = z.view(5, vocab).copy_(logits), nll.fill_(math.nan)
    module._fused(form)(z, targets, weights(5), 1e-2, nll, wants)
    assert all((whole[:64] == 77).all() and (whole[-64:] == 77).all() for whole in wholes)
    assert not nll.isnan().any()
    assert torch.equal(z, logits) != wants


def test_its_inputs_are_left_as_they_were():
    xs, each = draw(20), weights(20)
    before = [x.clone() for x in (*xs, each)]
    run(head_loss, *xs, 1e-2)
    head_loss(*xs, 1e-2, token_weight=each)
    assert all(torch.equal(x, kept) for x, kept in zip((*xs, each), before, strict=True))
