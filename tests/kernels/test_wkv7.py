import pytest
import torch
from parity import assert_parity

from kernels import wkv7 as module
from kernels.wkv7 import CHUNK, choose, wkv7, wkv7_reference

INPUTS = ("r", "w_raw", "k", "v", "a", "b", "state")
NAMES = ("y", "final", *(f"d{name}" for name in INPUTS))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# batch, steps, heads, head size: no chunk length divides most of them
SHAPES = [
    (1, 1, 1, 8), (2, 2, 2, 16), (1, 15, 2, 32), (2, 16, 1, 64), (1, 17, 3, 16), (3, 33, 2, 8), (1, 63, 1, 128),
    (2, 100, 2, 64), (1, 300, 2, 32),
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


def run(op, xs, dtype=None):
    """Outputs, and the gradients of all seven inputs under a random cotangent, which is the same for every precision."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    y, final = op(*xs)
    generator = torch.Generator().manual_seed(99)
    dtype = dtype or y.dtype
    dy, dfinal = (torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in (y, final))
    return y.detach(), final.detach(), *torch.autograd.grad((y, final), xs, (dy, dfinal))


def chunked(*xs):
    return wkv7(*xs, op="torch")


def compare(xs):
    dtype = xs[0].dtype
    fast, slow = run(chunked, xs), run(wkv7_reference, xs)
    exact = run(wkv7_reference, [x.double() for x in xs], dtype)
    for name, got, want, truth in zip(NAMES, fast, slow, exact, strict=True):
        assert got.dtype == want.dtype, name
        assert_parity(name, got, want, truth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    compare(draw(*shape, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("decay", ["any", "strongest", "none"])
@pytest.mark.parametrize("shape", [(2, 37, 2, 16), (1, 130, 1, 64)], ids=str)
def test_matches_reference_under_strong_and_weak_decay(shape, decay, device):
    compare(draw(*shape, device=device, decay=decay))


@pytest.mark.parametrize("device", DEVICES)
def test_the_decays_gradient_has_digits_where_the_sigmoid_is_flat(device):
    """Where torch's own sigmoid, and with it the reference, has none left: 1 - sigmoid(15) is 5 roundings of 1."""
    xs = draw(1, 40, 2, 8, device=device, decay="strongest")
    fast, exact = run(chunked, xs), run(wkv7_reference, [x.double() for x in xs], torch.float32)
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
    assert torch.autograd.gradcheck(chunked, xs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at", [1, 16, 21, 39])
def test_slices_with_carried_state_equal_the_whole(at, device):
    """Outputs and all gradients, that of the first state among them: it flows back through both slices."""

    def sliced(*xs):
        *steps, state = xs
        first, state = chunked(*(x[:, :at] for x in steps), state)
        second, state = chunked(*(x[:, at:] for x in steps), state)
        return torch.cat((first, second), 1), state

    xs = draw(2, 40, 2, 16, device=device)
    exact = run(wkv7_reference, [x.double() for x in xs], torch.float32)
    for name, got, whole, truth in zip(NAMES, run(sliced, xs), run(chunked, xs), exact, strict=True):
        assert_parity(name, got, whole, truth)


def test_is_a_sound_custom_op():
    xs = [x.requires_grad_() for x in draw(1, 20, 2, 8)]
    torch.library.opcheck(module._forward, tuple(xs))
    xs = [x.detach() for x in xs]
    _, final, before = module._forward(*xs)
    torch.library.opcheck(module._backward, (*xs[:6], before, torch.randn_like(xs[0]), final))


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_non_contiguous_inputs_are_read_right(steps):
    """The model passes views of (B, T, C)."""
    xs = draw(2, steps, 3, 8)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs[:6]] + [xs[6].mT.contiguous().mT]
    for name, got, want in zip(NAMES, run(chunked, strided), run(chunked, xs), strict=True):
        assert torch.equal(got, want), name


def test_works_under_compile():
    xs = draw(1, 20, 2, 8)
    compiled = torch.compile(chunked, backend="aot_eager", fullgraph=True)
    for name, got, want in zip(NAMES, run(compiled, xs), run(chunked, xs), strict=True):
        torch.testing.assert_close(got, want, msg=name)


def test_works_under_checkpointing():
    xs = draw(1, 20, 2, 8)

    def checkpointed(*xs):
        return torch.utils.checkpoint.checkpoint(chunked, *xs, use_reentrant=False)

    for name, got, want in zip(NAMES, run(checkpointed, xs), run(chunked, xs), strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [1, 20])
def test_autocast_does_not_reach_it(steps, device):
    """Mixed precision is for the model's matrices: the state stays as exact as it is without."""
    xs = draw(2, steps, 2, 8, device=device)
    plain = run(wkv7, xs)
    with torch.autocast(device, torch.bfloat16):
        mixed = run(wkv7, xs)
    if steps > 1:  # one step is plain operations, whose backward is the caller's
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


@pytest.mark.parametrize("steps", [2, 21])
def test_reads_no_memory_that_it_has_not_written(steps, request):
    xs = draw(2, steps, 2, 8)
    clean = run(chunked, xs)
    request.getfixturevalue("poisoned")
    for name, got, want in zip(NAMES, run(chunked, xs), clean, strict=True):
        assert torch.equal(got, want), name


def test_its_inputs_are_left_as_they_were():
    xs = draw(2, 21, 2, 8)
    before = [x.clone() for x in xs]
    run(chunked, xs)
    assert all(torch.equal(x, kept) for x, kept in zip(xs, before, strict=True))


def test_memory_kept_for_the_backward():
    """The inputs, and the state before each chunk: nothing of the size of a state per step."""
    xs = [x.requires_grad_() for x in draw(2, 256, 2, 32)]
    kept = []

    def pack(x):
        kept.append(x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        wkv7(*xs)
    inputs = sum(x.numel() * x.element_size() for x in xs[:6])
    states = 256 * xs[6].numel() * 4
    assert inputs < sum(kept) <= inputs + states / CHUNK + 4096


def test_auto_takes_the_chunks_for_more_than_one_step():
    assert (choose("auto", 1), choose("auto", 2)) == ("reference", "torch")
    assert {choose(op, steps) for op in ("torch",) for steps in (1, 50)} == {"torch"}
    assert {choose(op, steps) for op in ("reference",) for steps in (1, 50)} == {"reference"}
    xs = draw(1, 1, 2, 8)
    assert all(torch.equal(x, y) for x, y in zip(wkv7(*xs), wkv7_reference(*xs), strict=True))


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
@pytest.mark.parametrize("op", ["auto", "torch", "reference"])
def test_refuses_what_does_not_fit(change, message, op):
    xs = dict(zip(INPUTS, draw(1, 4, 2, 8), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        wkv7(**xs, op=op)


def test_each_gradient_has_its_own_input_s_precision():
    """Under autocast w_raw is float32 beside a bfloat16 r: its gradient must not be rounded to bfloat16 on the way."""
    torch.manual_seed(0)
    kappa = torch.nn.functional.normalize(torch.randn(1, 20, 2, 16), dim=-1)
    r, w_raw, k, v = (torch.randn(1, 20, 2, 16) for _ in range(4))
    xs = [r.bfloat16(), w_raw, k.bfloat16(), v.bfloat16(), -kappa, kappa * 0.5, torch.zeros(1, 2, 16, 16)]
    xs = [x.requires_grad_() for x in xs]
    y, _ = wkv7(*xs, op="torch")
    cotangent = torch.randn_like(y)
    grads = torch.autograd.grad(y, xs, cotangent)
    assert [grad.dtype for grad in grads] == [x.dtype for x in xs]
    exact = [x.detach().double().requires_grad_() for x in xs]
    wanted = torch.autograd.grad(wkv7_reference(*exact)[0], exact, cotangent.double())
    for i in (1, 4, 5, 6):
        torch.testing.assert_close(grads[i].double(), wanted[i], atol=2e-5, rtol=1e-4)
