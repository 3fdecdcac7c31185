import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from parity import assert_parity
from recurrence import Where, param
from sentinels import guard
from torch import Tensor

from kernels import build
from kernels import time_mix7 as module
from kernels.choice import choose
from kernels.time_mix7 import prepare, prepare_reference, readout, readout_reference

DTYPES = [torch.float32, torch.bfloat16]
# batch, steps, heads, head size
SHAPES = [(1, 1, 1, 8), (2, 15, 3, 40), (1, 17, 3, 64), (2, 3, 1, 256), (1, 70, 12, 8), (2, 70, 1, 5), (1, 20, 2, 33)]
EPS = 64e-5
CPU = param(Where("cpu", "cpu"))
TRITON = [
    param(Where("triton", device)) for device in ("cpu", "cuda") if device == "cuda" or "TRITON_INTERPRET" in os.environ
]
FUSED = pytest.mark.parametrize("where", [CPU, *TRITON])


class Case(NamedTuple):
    """One of the operators: `of(form)` is it in that form, `reference` the same in torch."""

    name: str
    of: Callable[[str], Callable[..., Any]]
    reference: Callable[..., Any]
    xs: list[Tensor | None]
    parameters: int
    """the last so many of xs"""


def draw(batch, steps, heads, size, dtype=torch.float32, stored=None, device="cpu"):
    """Each operator with its arguments, `prepare` twice: as in layer 0, and as in the others."""
    generator = torch.Generator().manual_seed(0)
    stored = stored or dtype

    def randn(*shape, to=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, to)

    flat, split, channels = (batch, steps, heads * size), (batch, steps, heads, size), heads * size
    k0, v0, v_first, a_raw, v_raw = (randn(*flat) for _ in range(5))
    vectors = [randn(1, 1, channels, to=stored) for _ in range(2)]
    norm = [randn(channels, to=stored), randn(channels, to=stored), randn(heads, size, to=stored)]

    def of(operator, **kwargs):
        return lambda form: lambda *xs: operator(form, *xs, **kwargs)

    before, plain = of(module.apply_prepare, size=size), partial(prepare_reference, size=size)
    return [
        Case("prepare", before, plain, [k0, v0, v_first, a_raw, v_raw, *vectors], 2),
        Case("prepare in layer 0", before, plain, [k0, v0, None, a_raw, None, *vectors], 2),
        Case(
            "readout", of(module.apply_readout, eps=EPS), partial(readout_reference, eps=EPS),
            [*(randn(*split) for _ in range(4)), randn(*flat), *norm], 3,
        ),
    ]  # fmt: skip


def run(op, xs, dtype=None):
    """Outputs, and the gradients of all inputs under a random cotangent, which is the same for every precision."""
    xs = [None if x is None else x.detach().clone().requires_grad_() for x in xs]
    outputs = op(*xs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(99)
    cotangents = [torch.randn(y.shape, generator=generator).to(dtype or y.dtype).to(y) for y in outputs]
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, [x for x in xs if x is not None], cotangents)


def compare(case, where, dtype, yardstick=None, judged=None):
    """Parity with the reference, or with a `yardstick`; in the dtype `judged`, if it is given."""
    slow = run(yardstick or case.reference, case.xs)
    exact = run(case.reference, [None if x is None else x.double() for x in case.xs], dtype)
    fast = run(case.of(where.form), case.xs)
    for i, (got, want, truth) in enumerate(zip(fast, slow, exact, strict=True)):
        assert got.dtype == want.dtype, f"{case.name} {i}"
        assert_parity(f"{case.name} {i}", got.to(judged or got.dtype), want.to(judged or want.dtype), truth)


def assert_equal(xs, ys):
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        assert torch.equal(x, y), i


@FUSED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, where):
    for case in draw(*shape, dtype, device=where.device):
        compare(case, where, dtype)


def in_float32(case):
    """The reference on inputs of many types, computed in float32; the results in the types that they should have."""

    def call(*xs):
        ys = case.reference(*(None if x is None else x.float() for x in xs))
        return tuple(y.to(xs[0].dtype) for y in ys) if isinstance(ys, tuple) else ys.to(xs[0].dtype)

    return call


@FUSED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_may_have_another_precision_than_activations(dtype, where):
    stored = DTYPES[dtype == torch.float32]
    for case in draw(2, 20, 3, 16, dtype, stored, where.device):
        compare(case, where, dtype, in_float32(case))


@FUSED
def test_activations_may_differ_in_precision(where):
    """As autocast makes them: what has seen a matrix is bfloat16, what a bias was added to is not."""
    for case in draw(2, 20, 3, 16, torch.bfloat16, device=where.device):
        low = case.xs[: -case.parameters]
        mixed = [x if x is None or i in (0, 1) else x.float() for i, x in enumerate(low)]
        case = case._replace(xs=[*mixed, *case.xs[len(low) :]])
        # the backward of prepare reads v, which is as exact as its dtype
        compare(case, where, torch.bfloat16, in_float32(case), torch.bfloat16)


def test_prepare_is_its_formula():
    k0, v0, v_first, a_raw, v_raw, k_k, k_a = xs = draw(1, 1, 1, 3)[0].xs
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
    xs = draw(1, 1, 1, 4)[2].xs
    y, r, k, v, g, weight, bias, r_k = (x.double().flatten() for x in xs)
    normed = (y - y.mean()) / (y.var(correction=0) + EPS).sqrt() * weight + bias
    want = (normed + (r * k * r_k).sum() * v) * g
    torch.testing.assert_close(readout(*xs, eps=EPS).double().flatten(), want, rtol=1e-5, atol=1e-6)


def test_gradients_of_the_references():
    for case in draw(1, 2, 2, 3):
        given = [x is not None for x in case.xs]

        def call(*xs, case=case, given=given):
            xs = iter(xs)
            return case.reference(*(next(xs) if there else None for there in given))

        assert torch.autograd.gradcheck(call, [x.double().requires_grad_() for x in case.xs if x is not None])


@FUSED
def test_short_keys_have_no_direction(where):
    """Below 1e-12 kappa is a multiple of the key; a key of zeros has a gradient all the same."""
    for case in draw(1, 12, 3, 16, device=where.device)[:2]:
        scale = torch.tensor([0.0, 1e-30, 1e-15, 1e-14, 1e-11, 1.0], device=where.device).repeat(2)
        case.xs[0] *= scale[:, None]
        compare(case, where, torch.float32)
        for i in range(6):  # each length on its own: the gradients of the short ones are large
            xs = [x if x is None or x.shape[1] == 1 else x[:, i : i + 1] for x in case.xs]
            for got, want in zip(run(case.of(where.form), xs), run(case.reference, xs), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
        assert all((x[:, 0] == 0).all() for x in case.of(where.form)(*case.xs)[::2])


@FUSED
def test_heads_of_one_value_have_no_variance(where):
    (*_, case) = draw(2, 9, 3, 16, device=where.device)
    case.xs[0][:, ::2] = 3.0
    case.xs[0][:, 1::2, 1] = 0.0
    compare(case, where, torch.float32)


@FUSED
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # in NumPy, for the interpreter
def test_gradients_have_digits_where_a_sigmoid_is_flat(where):
    """Where torch's own sigmoid, and with it the reference, has none left: 1 - sigmoid(15) is 5 roundings of 1."""
    for share, exact in ((-15, (7, 8)), (15, (5, 7))):  # the gradients of v0, a_raw and v_raw are 5, 7 and 8
        case = draw(1, 9, 2, 16, device=where.device)[0]
        case.xs[3].add_(15)
        case.xs[4].add_(share)
        got = run(case.of(where.form), case.xs)
        want = run(case.reference, [x.double() for x in case.xs], torch.float32)
        for i in exact:
            assert (got[i] - want[i]).norm() < 1e-5 * want[i].norm(), i


@FUSED
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # in NumPy, for the interpreter
@pytest.mark.parametrize("flush", [False, True])
def test_extreme_gates(flush, where, request):
    request.addfinalizer(lambda: torch.set_flush_denormal(False))
    for case in draw(1, 3, 2, 16, device=where.device)[:2]:
        for x in case.xs[3:5]:
            if x is not None:
                x.copy_(torch.tensor([-1e30, -200.0, 200.0, 1e30], device=where.device).repeat(24).view_as(x))
        want = run(case.reference, [None if x is None else x.double() for x in case.xs], torch.float32)
        torch.set_flush_denormal(flush)  # then 1 / (1 + e^88) is 0
        for got, truth in zip(run(case.of(where.form), case.xs), want, strict=True):
            torch.testing.assert_close(got, truth.float(), rtol=1e-4, atol=1e-5)


def guarded(patched):
    """`guard`, for `torch.empty` too, but not for what Triton's interpreter makes."""
    plain, check = Tensor.new_empty, guard(patched)
    between = Tensor.new_empty
    patched.setattr(Tensor, "new_empty", lambda *xs, **kwargs: (plain if kwargs else between)(*xs, **kwargs))
    patched.setattr(torch, "empty", lambda *shape, device: between(torch.zeros(1), shape))
    return check


@FUSED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_writes_all_and_nothing_past_the_ends(shape, dtype, where, monkeypatch):
    if where.device == "cuda":
        pytest.skip("the sentinels are for the CPU")
    forward, residual, read = draw(*shape, dtype)
    form = module._implementation(where.form)
    size = shape[-1]
    for case, wanted in ((forward, True), (residual, True), (forward, False)):
        k0, v0, v_first, a_raw, v_raw, k_k, k_a = case.xs
        outputs = [x.unflatten(-1, (-1, size)) for x in (k0, v0, k0, v0)]
        v = None if v_first is None else outputs[1]
        with monkeypatch.context() as patched:
            check = guarded(patched)
            form.prepare(*case.xs, size)
            assert check() == 4
            form.prepare_backward(k0, v_first, a_raw, v_raw, v, k_k, k_a, *outputs, size, wanted)
            assert check() >= 4 + (3 if v_first is None else 5) + wanted
    for wanted in (True, False):
        with monkeypatch.context() as patched:
            check = guarded(patched)
            form.readout(*read.xs, EPS)
            assert check() == 1
            form.readout_backward(*read.xs, read.xs[4], EPS, wanted)
            assert check() >= 6 + wanted


@FUSED
def test_inputs_are_left_as_they_were(where):
    for case in draw(2, 17, 2, 16, device=where.device):
        xs = [x for x in case.xs if x is not None]
        before = [x.clone() for x in xs]
        run(case.of(where.form), case.xs)
        assert_equal(xs, before)


@FUSED
def test_non_contiguous_inputs_and_cotangents_are_read_right(where):
    for case in draw(2, 3, 2, 16, device=where.device):
        strided = [x if x is None else torch.stack((x, x), -1)[..., 1] for x in case.xs]
        op = case.of(where.form)
        assert_equal(run(op, strided), run(op, case.xs))

        def alike(xs, op=op):
            xs = [None if x is None else x.detach().requires_grad_() for x in xs]
            ys = op(*xs)
            total = sum(y.sum() for y in (ys if isinstance(ys, tuple) else (ys,)))  # its cotangents are expanded
            return torch.autograd.grad(total, [x for x in xs if x is not None])

        want = alike(case.xs, case.reference)
        for got, right in zip(alike(strided), want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


@FUSED
def test_reads_no_memory_that_it_has_not_written(where):
    cases = draw(2, 21, 3, 8, device=where.device)
    clean = [run(case.of(where.form), case.xs) for case in cases]
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        assert torch.empty(3).isnan().all()
        for case, want in zip(cases, clean, strict=True):
            assert_equal(run(case.of(where.form), case.xs), want)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_a_bit(threads, monkeypatch):
    for case in draw(1, 270, 16, 64):
        want = run(case.of("cpu"), case.xs)
        with monkeypatch.context() as patched:
            patched.setattr(build, "threads", lambda: threads)
            assert_equal(run(case.of("cpu"), case.xs), want)


@FUSED
def test_gradients_of_parameters_are_made_where_they_are_wanted(where, monkeypatch):
    form = module._implementation(where.form)
    wanted = []
    for name in ("prepare_backward", "readout_backward"):
        backward = getattr(form, name)
        monkeypatch.setattr(form, name, lambda *xs, backward=backward: wanted.append(xs[-1]) or backward(*xs))
    for case in draw(2, 17, 2, 16, device=where.device):
        all_of_them = run(case.of(where.form), case.xs)[-case.parameters :]
        for trained in range(-1, case.parameters):
            xs = [None if x is None else x.clone().requires_grad_() for x in case.xs]
            parameters = xs[-case.parameters :]
            for i, p in enumerate(parameters):
                p.requires_grad_(i == trained)
            outputs = case.of(where.form)(*xs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            generator = torch.Generator().manual_seed(99)
            torch.autograd.backward(outputs, [torch.randn(y.shape, generator=generator).to(y) for y in outputs])
            for i, p in enumerate(parameters):
                assert torch.equal(p.grad, all_of_them[i]) if i == trained else p.grad is None
            assert all(x.grad is not None for x in xs[: -case.parameters] if x is not None)
    assert wanted == [True, False, True, True] * 2 + [True, False, True, True, True]


def test_the_value_of_layer_0_learns_from_all_layers():
    xs = [x.requires_grad_() for x in draw(1, 5, 2, 8)[0].xs]
    twice = torch.autograd.grad(sum(prepare(*xs, size=8)[1].sum() for _ in range(2)), xs[2])[0]
    torch.testing.assert_close(twice, 2 * torch.autograd.grad(prepare(*xs, size=8)[1].sum(), xs[2])[0])


@FUSED
def test_memory_kept_for_the_backward(where):
    """Inputs, and v, which the recurrence keeps as well; not v0, which nobody else needs."""
    for case, others in zip(draw(1, 8, 2, 16, device=where.device), (5, 2, 5), strict=True):
        xs = [None if x is None else x.requires_grad_() for x in case.xs]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.data_ptr()) or x, lambda x: x):
            outputs = case.of(where.form)(*xs)
        assert len(kept) == others + case.parameters
        values = [x.data_ptr() for x in xs if x is not None]
        if case.name == "prepare":
            values[1] = outputs[1].data_ptr()
        elif case.name != "readout":
            del values[1]
        assert sorted(kept) == sorted(values)


@FUSED
def test_are_sound_custom_ops(where):
    for case in draw(1, 5, 2, 8, device=where.device):
        for trained in (True, False):
            xs = [None if x is None else x.detach().requires_grad_() for x in case.xs]
            if not trained:
                xs[-case.parameters :] = [x.detach() for x in xs[-case.parameters :]]
            if case.name == "readout":
                torch.library.opcheck(module._readout.registered, (*xs, EPS, where.form))
                xs = [x.detach() for x in xs]
                torch.library.opcheck(module._readout_backward.registered, (*xs, xs[4], EPS, trained, where.form))
                continue
            torch.library.opcheck(module._prepare.registered, (*xs, 8, where.form))
            k0, v0, v_first, *others = (None if x is None else x.detach() for x in xs)
            outputs = [x.unflatten(-1, (-1, 8)) for x in (v0, k0, v0, k0)]
            v = None if v_first is None else outputs[1]
            inputs = (k0, v_first, *others[:2], v, *others[2:], *outputs)
            torch.library.opcheck(module._prepare_backward.registered, (*inputs, 8, trained, where.form))


@FUSED
def test_work_under_compile_and_checkpointing(where):
    for case in draw(1, 5, 2, 8, device=where.device):
        op = case.of(where.form)
        want = run(op, case.xs)
        assert_equal(run(torch.compile(op, backend="aot_eager", fullgraph=True), case.xs), want)
        checkpointed = partial(torch.utils.checkpoint.checkpoint, op, use_reentrant=False)
        assert_equal(run(checkpointed, case.xs), want)


def public(case):
    return partial(readout, eps=EPS) if case.name == "readout" else partial(prepare, size=case.xs[0].shape[-1] // 2)


def test_public_operators_compile():
    for case in draw(1, 5, 2, 8):
        op = public(case)
        assert_equal(run(torch.compile(op, backend="aot_eager", fullgraph=True), case.xs), run(op, case.xs))


def test_nobody_asking_for_gradients_gets_the_same():
    for case in draw(2, 5, 2, 8):
        with torch.no_grad():
            got = public(case)(*case.xs)
        assert_equal(
            got if isinstance(got, tuple) else [got], run(public(case), case.xs)[: 1 if case.name == "readout" else 4]
        )


def test_every_form_is_chosen_where_it_works(monkeypatch):
    x = torch.zeros(1)
    assert choose("time_mix7", "auto", module.FORMS, x) == "cpu"
    assert choose("time_mix7", "fla", module.FORMS, x) == "cpu"
    for case in draw(1, 2, 2, 8):
        reference = run(case.reference, case.xs)
        for op in ("torch", "reference"):
            assert_equal(run(partial(public(case), op=op), case.xs), reference)
        assert_equal(run(partial(public(case), op="cpu"), case.xs), run(case.of("cpu"), case.xs))
        with pytest.raises(ValueError, match=r"op='triton' for torch.float32 on cpu"):
            public(case)(*case.xs, op="triton")
        on_meta = public(case)(*(None if x is None else x.to("meta") for x in case.xs))
        assert (on_meta[0] if isinstance(on_meta, tuple) else on_meta).is_meta
        with monkeypatch.context() as patched:
            patched.setattr(build, "available", lambda *_: False)
            assert_equal(run(public(case), case.xs), reference)
    with pytest.raises(ValueError, match="form='fla'"):
        module._implementation("fla")


@pytest.mark.parametrize(("changes", "message"), [
    ({0: (1, 3, 12), 1: (1, 3, 12), 2: (1, 3, 12), 3: (1, 3, 12), 4: (1, 3, 12), 5: (12,), 6: (12,)}, "N is 8; it must divide"),
    ({3: (1, 2, 16)}, r"an activation is \(1, 2, 16\)"),
    ({2: (3, 16)}, r"an activation is \(3, 16\)"),
    ({6: (8,)}, r"a parameter is \(8,\)"),
])  # fmt: skip
def test_prepare_refuses_what_does_not_fit(changes, message):
    xs = draw(1, 3, 2, 8)[0].xs
    for i, shape in changes.items():
        xs[i] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        prepare(*xs, size=8)


@pytest.mark.parametrize(("i", "shape", "message"), [
    (1, (1, 3, 1, 16), r"an activation is \(1, 3, 1, 16\)"),
    (4, (1, 2, 16), r"g is \(1, 2, 16\)"),
    (5, (2,), r"a parameter is \(2,\)"),
])  # fmt: skip
def test_readout_refuses_what_does_not_fit(i, shape, message):
    xs = draw(1, 3, 2, 8)[2].xs
    xs[i] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        readout(*xs, eps=EPS)
