from functools import partial

import pytest
import torch
from parity import assert_parity
from recurrence import run

from kernels import build
from kernels import wkv7 as module
from kernels.choice import choose
from kernels.wkv7 import CHUNK, wkv7, wkv7_reference

INPUTS = ("r", "w_raw", "k", "v", "a", "b", "state")
NAMES = ("y", "final", *(f"d{name}" for name in INPUTS))
OPS = ["torch", "cpu"]
OPS_AND_DEVICES = [("torch", "cpu"), ("cpu", "cpu"), pytest.param("torch", "cuda", marks=pytest.mark.gpu)]
# batch, steps, heads, head size: no chunk length divides most of them
SHAPES = [
    (1, 1, 1, 8), (2, 2, 2, 16), (1, 15, 2, 32), (2, 16, 1, 64), (1, 17, 3, 16), (3, 33, 2, 8), (1, 63, 1, 128),
    (2, 100, 2, 64), (1, 300, 2, 32), (2, 1, 3, 64), (2, 21, 3, 5), (1, 18, 1, 40), (1, 33, 1, 96),
    (1, 17, 1, 70),
]  # fmt: skip
DECAYS = {"usual": (-6.0, 2.0), "any": (-15.0, 15.0), "strongest": (15.0, 15.0), "none": (-15.0, -15.0)}


def draw(batch, steps, heads, size, dtype=torch.float32, device="cpu", decay="usual", seed=0):
    """Inputs like the model's: a is a negative unit vector, b that vector times a learning rate in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, steps, heads, size)
    low, high = DECAYS[decay]
    kappa = torch.nn.functional.normalize(randn(*shape), dim=-1)
    w_raw = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    xs = [randn(*shape), w_raw, randn(*shape), randn(*shape), -kappa, kappa * torch.sigmoid(randn(*shape))]
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(device, dtype) for x in xs] + [randn(batch, heads, size, size).to(device, state_dtype)]


def compare(op, xs):
    dtype = xs[0].dtype
    fast, slow = run(partial(wkv7, op=op), xs), run(wkv7_reference, xs)
    exact = run(wkv7_reference, [x.double() for x in xs], dtype)
    for name, got, want, truth in zip(NAMES, fast, slow, exact, strict=True):
        assert got.dtype == want.dtype, name
        assert_parity(name, got, want, truth)


@pytest.mark.parametrize(("op", "device"), OPS_AND_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, op, device):
    compare(op, draw(*shape, dtype, device))


def test_compiled_form_takes_heads_of_one_channel():
    """The chunks do not: where the one direction is all but removed at each step, their products cancel."""
    compare("cpu", draw(4, 20, 8, 1))


@pytest.mark.parametrize(("op", "device"), OPS_AND_DEVICES)
@pytest.mark.parametrize("decay", ["any", "strongest", "none"])
@pytest.mark.parametrize("shape", [(2, 37, 2, 16), (1, 130, 1, 64)], ids=str)
def test_matches_reference_under_strong_and_weak_decay(shape, decay, op, device):
    compare(op, draw(*shape, device=device, decay=decay))


@pytest.mark.parametrize(("op", "device"), OPS_AND_DEVICES)
def test_the_decays_gradient_has_digits_where_the_sigmoid_is_flat(op, device):
    """Where torch's own sigmoid, and with it the reference, has none left: 1 - sigmoid(15) is 5 roundings of 1."""
    xs = draw(1, 40, 2, 8, device=device, decay="strongest")
    fast, exact = run(partial(wkv7, op=op), xs), run(wkv7_reference, [x.double() for x in xs], torch.float32)
    dw_raw, truth = fast[NAMES.index("dw_raw")], exact[NAMES.index("dw_raw")]
    assert (dw_raw - truth).norm() < 1e-5 * truth.norm()


def test_reference_is_the_recurrence():
    """By its definition, one number at a time."""
    r, w_raw, k, v, a, b, state = draw(1, 3, 1, 4, torch.float64)
    y, final = wkv7_reference(r, w_raw, k, v, a, b, state)
    S = state[0, 0].tolist()
    for t in range(3):
        R, W, K, V, A, B = (x[0, t, 0].tolist() for x in (r, w_raw, k, v, a, b))
        decay = [torch.tensor(-(torch.e**-0.5) / (1 + torch.e**-w)).exp().item() for w in W]
        removed = [sum(S[i][j] * A[j] for j in range(4)) for i in range(4)]
        S = [[S[i][j] * decay[j] + removed[i] * B[j] + V[i] * K[j] for j in range(4)] for i in range(4)]
        expected = torch.tensor([sum(S[i][j] * R[j] for j in range(4)) for i in range(4)], dtype=torch.float64)
        torch.testing.assert_close(y[0, t, 0], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(final[0, 0], torch.tensor(S, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_float64_gradients_match_finite_differences():
    xs = [x.requires_grad_() for x in draw(1, CHUNK + 3, 1, 2, torch.float64)]
    assert torch.autograd.gradcheck(partial(wkv7, op="torch"), xs)


@pytest.mark.parametrize(("op", "device"), OPS_AND_DEVICES)
@pytest.mark.parametrize("at", [1, 16, 21, 39])
def test_slices_with_carried_state_equal_the_whole(at, op, device):
    """Outputs and all gradients, that of the first state among them: it flows back through both slices."""

    def sliced(*xs):
        *steps, state = xs
        first, state = wkv7(*(x[:, :at] for x in steps), state, op=op)
        second, state = wkv7(*(x[:, at:] for x in steps), state, op=op)
        return torch.cat((first, second), 1), state

    xs = draw(2, 40, 2, 16, device=device)
    exact = run(wkv7_reference, [x.double() for x in xs], torch.float32)
    for name, got, whole, truth in zip(NAMES, run(sliced, xs), run(partial(wkv7, op=op), xs), exact, strict=True):
        assert_parity(name, got, whole, truth)


def test_is_a_sound_custom_op():
    xs = [x.requires_grad_() for x in draw(1, 20, 2, 8)]
    torch.library.opcheck(module._forward, tuple(xs))
    xs = [x.detach() for x in xs]
    _, final, before = module._forward(*xs)
    torch.library.opcheck(module._backward, (*xs[:6], before, torch.randn_like(xs[0]), final))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_sound_custom_op_compiled(dtype):
    xs = [x.requires_grad_() for x in draw(1, 20, 2, 8, dtype)]
    torch.library.opcheck(module._cpu_forward, (*xs, True))
    xs = [x.detach() for x in xs]
    torch.library.opcheck(module._cpu_forward, (*xs, False))
    _, final, before = module._cpu_forward(*xs, True)
    torch.library.opcheck(module._cpu_backward, (*xs[:6], before, torch.randn_like(xs[0]), final))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_non_contiguous_inputs_are_read_right(steps, op):
    """The model passes views of (B, T, C)."""
    chunked = partial(wkv7, op=op)
    xs = draw(2, steps, 3, 8)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs[:6]] + [xs[6].mT.contiguous().mT]
    for name, got, want in zip(NAMES, run(chunked, strided), run(chunked, xs), strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("op", OPS)
def test_works_under_compile(op):
    chunked = partial(wkv7, op=op)
    xs = draw(1, 20, 2, 8)
    compiled = torch.compile(chunked, backend="aot_eager", fullgraph=True)
    for name, got, want in zip(NAMES, run(compiled, xs), run(chunked, xs), strict=True):
        torch.testing.assert_close(got, want, msg=name)


@pytest.mark.parametrize("op", OPS)
def test_works_under_checkpointing(op):
    chunked = partial(wkv7, op=op)
    xs = draw(1, 20, 2, 8)

    def checkpointed(*xs):
        return torch.utils.checkpoint.checkpoint(chunked, *xs, use_reentrant=False)

    for name, got, want in zip(NAMES, run(checkpointed, xs), run(chunked, xs), strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize(("op", "device"), [*OPS_AND_DEVICES, ("reference", "cpu")])
@pytest.mark.parametrize("steps", [1, 20])
def test_autocast_does_not_reach_it(steps, op, device):
    """Mixed precision is for the model's matrices: the state stays as exact as it is without."""
    xs = draw(2, steps, 2, 8, device=device)
    plain = run(partial(wkv7, op=op), xs)
    with torch.autocast(device, torch.bfloat16):
        mixed = run(partial(wkv7, op=op), xs)
    if op != "reference":  # which is plain operations, whose backward is the caller's
        assert all(torch.equal(x, y) for x, y in zip(mixed, plain, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(mixed[:2], plain[:2], strict=True))


@pytest.fixture
def poisoned():
    """torch.empty gives NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [8, 64, 70])
@pytest.mark.parametrize("steps", [1, 2, 21])
def test_reads_no_memory_that_it_has_not_written(steps, size, op, request):
    chunked = partial(wkv7, op=op)
    xs = draw(2, steps, 2, size)
    clean = run(chunked, xs)
    request.getfixturevalue("poisoned")
    for name, got, want in zip(NAMES, run(chunked, xs), clean, strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("op", OPS)
def test_its_inputs_are_left_as_they_were(op):
    chunked = partial(wkv7, op=op)
    xs = draw(2, 21, 2, 8)
    before = [x.clone() for x in xs]
    run(chunked, xs)
    assert all(torch.equal(x, kept) for x, kept in zip(xs, before, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_memory_kept_for_the_backward(op):
    """The inputs, and the state before each chunk: nothing of the size of a state per step."""
    xs = [x.requires_grad_() for x in draw(2, 256, 2, 32)]
    kept = []

    def pack(x):
        kept.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        wkv7(*xs, op=op)
    inputs = sum(x.numel() * x.element_size() for x in xs[:6])
    states = 256 * xs[6].numel() * 4
    assert inputs < sum(kept) <= inputs + states / CHUNK + 4096


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("shape", [(1, 20, 1, 64), (1, 20, 2, 48), (2, 1, 1, 64), (1, 20, 1, 96)], ids=str)
def test_threads_do_not_change_a_bit(shape, threads, monkeypatch):
    xs = draw(*shape)
    want = run(partial(wkv7, op="cpu"), xs)
    monkeypatch.setattr(build, "threads", lambda: threads)
    for name, got, one in zip(NAMES, run(partial(wkv7, op="cpu"), xs), want, strict=True):
        assert torch.equal(got, one), name


@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 19, 1, 5), (1, 16, 2, 70), (1, 1, 1, 7)], ids=str)
def test_writes_nothing_past_the_ends(shape, monkeypatch):
    """Every result that the compiled form gets to fill lies between sentinels."""
    guarded, empty = [], torch.empty_like

    def between_sentinels(like):
        whole = torch.full((like.numel() + 128,), 77.0, dtype=like.dtype)
        guarded.append(whole)
        return whole[64:-64].view(like.shape)

    monkeypatch.setattr(torch, "empty_like", between_sentinels)
    run(partial(wkv7, op="cpu"), draw(*shape))
    monkeypatch.setattr(torch, "empty_like", empty)
    assert len(guarded) == 9
    assert all((whole[:64] == 77).all() and (whole[-64:] == 77).all() for whole in guarded)


def test_auto_takes_the_fastest_that_works(monkeypatch):
    x = torch.zeros(1)

    def auto(x, compiled=True):
        return [choose("auto", x, steps, compiled) for steps in (1, 50)]

    assert auto(x) == auto(x.bfloat16()) == ["cpu", "cpu"]
    assert auto(x.double()) == auto(x.to("meta")) == auto(x, compiled=False) == ["reference", "torch"]
    for op in ("torch", "reference"):
        assert {choose(op, x, steps, compiled) for steps in (1, 50) for compiled in (False, True)} == {op}
    with pytest.raises(ValueError, match=r"op='cpu' for torch\.float64 on cpu; it works on .*; say op='auto'"):
        choose("cpu", x.double(), 1, compiled=True)
    with pytest.raises(ValueError, match=r"op='cpu' for torch\.float32 on meta"):
        choose("cpu", x.to("meta"), 1, compiled=True)
    with pytest.raises(ValueError, match="this operator has no compiled form; say op='auto'"):
        choose("cpu", x, 1)
    monkeypatch.setattr(build, "library", lambda: None)
    assert auto(x) == ["reference", "torch"]
    with pytest.raises(RuntimeError, match="op='cpu' could not be compiled: a warning has said why"):
        choose("cpu", x, 1, compiled=True)


def test_auto_runs_where_the_compiled_form_can_not(monkeypatch):
    exact = [x.double() for x in draw(1, 20, 2, 8)]
    assert wkv7(*exact)[0].dtype == torch.float64
    with pytest.raises(ValueError, match=r"op='cpu' for torch\.float64"):
        wkv7(*exact, op="cpu")
    xs = [x.float() for x in exact]
    monkeypatch.setattr(build, "library", lambda: None)
    assert all(torch.equal(x, y) for x, y in zip(wkv7(*xs), wkv7(*xs, op="torch"), strict=True))


def test_inputs_of_other_precisions_are_widened():
    xs = draw(1, 20, 2, 8, torch.bfloat16)
    other = [x.double() if i in (1, 3) else x for i, x in enumerate(xs)]
    for got, want in zip(wkv7(*other, op="cpu"), wkv7(*xs, op="cpu"), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 3, 2, 8)}, r"k is \(1, 3, 2, 8\) but r is \(1, 4, 2, 8\); all six share"),
        ({"b": torch.zeros(1, 4, 2, 9)}, r"b is \(1, 4, 2, 9\) but r is"),
        ({"state": torch.zeros(2, 8, 8)}, r"state is \(2, 8, 8\); it must be \(1, 2, 8, 8\)"),
        ({"state": torch.zeros(2, 2, 8, 8)}, r"state is \(2, 2, 8, 8\); it must be \(1, 2, 8, 8\)"),
        ({"state": torch.zeros(1, 2, 8, 8, dtype=torch.bfloat16)}, r"state is torch.bfloat16; .*; pass state.float"),
        ({"r": torch.zeros(1, 4, 16)}, r"r is \(1, 4, 16\); it must be \(B, T, H, N\)"),
        ({name: torch.zeros(1, 0, 2, 8) for name in INPUTS[:6]}, r"r is \(1, 0, 2, 8\); .*T of 1 or more"),
    ],
)
@pytest.mark.parametrize("op", ["auto", "cpu", "torch", "reference"])
def test_refuses_what_does_not_fit(change, message, op):
    xs = dict(zip(INPUTS, draw(1, 4, 2, 8), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        wkv7(**xs, op=op)


@pytest.mark.parametrize("op", OPS)
def test_each_gradient_has_its_own_input_s_precision(op):
    """Under autocast w_raw is float32 beside a bfloat16 r: its gradient must not be rounded to bfloat16 on the way."""
    torch.manual_seed(0)
    kappa = torch.nn.functional.normalize(torch.randn(1, 20, 2, 16), dim=-1)
    r, w_raw, k, v = (torch.randn(1, 20, 2, 16) for _ in range(4))
    xs = [r.bfloat16(), w_raw, k.bfloat16(), v.bfloat16(), -kappa, kappa * 0.5, torch.zeros(1, 2, 16, 16)]
    xs = [x.requires_grad_() for x in xs]
    y, _ = wkv7(*xs, op=op)
    cotangent = torch.randn_like(y)
    grads = torch.autograd.grad(y, xs, cotangent)
    assert [grad.dtype for grad in grads] == [x.dtype for x in xs]
    exact = [x.detach().double().requires_grad_() for x in xs]
    wanted = torch.autograd.grad(wkv7_reference(*exact)[0], exact, cotangent.double())
    for i in (1, 4, 5, 6):
        torch.testing.assert_close(grads[i].double(), wanted[i], atol=2e-5, rtol=1e-4)
