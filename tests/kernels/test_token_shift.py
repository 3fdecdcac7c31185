import importlib.util
import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from parity import assert_parity
from recurrence import Where, param
from sentinels import guard
from torch import Tensor

from kernels import build
from kernels import token_shift as module
from kernels.token_shift import Norm, mix, mix_reference

DTYPES = [torch.float32, torch.bfloat16]
CPU, GPU, INTERPRETER = Where("cpu", "cpu"), Where("triton", "cuda"), Where("triton", "cpu")
WHERE = [CPU, GPU, *([INTERPRETER] if "TRITON_INTERPRET" in os.environ else [])]
FUSED = pytest.mark.parametrize("where", [param(w) for w in WHERE])
SMALL = [(4, 1, 17), (3, 2, 40), (1, 15, 33), (2, 17, 24)]  # batch, steps, channels
SHAPES = [*SMALL, (1, 1, 768), (1, 70, 5), (2, 33, 64)]
EACH_SHAPE = pytest.mark.parametrize(
    ("where", "shape"), [param(w, shape) for w in WHERE for shape in (SMALL if w.slow else SHAPES)]
)
EPS = 1e-5


class Case(NamedTuple):
    x: Tensor
    last: Tensor
    mus: list[Tensor]
    norm: list[Tensor]
    """weight and bias, or nothing"""

    @property
    def flat(self):
        return [self.x, self.last, *self.mus, *self.norm]

    @property
    def arguments(self):
        return self.x, self.last, self.mus, Norm(*self.norm, EPS) if self.norm else None

    def map(self, f):
        return Case(f(self.x), f(self.last), [f(y) for y in self.mus], [f(y) for y in self.norm])


def draw(batch, steps, channels, mixes=6, dtype=torch.float32, stored=None, normed=True, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, to=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, to)

    stored = stored or dtype
    mus = [randn(1, 1, channels, to=stored) for _ in range(mixes)]
    norm = [randn(channels, to=stored), randn(channels, to=stored)] if normed else []
    return Case(3 + 2 * randn(batch, steps, channels), randn(batch, channels), mus, norm)


def form(where):
    return partial(module.apply, where.form)


def run(op, case, dtype=None, wanted=lambda _: True):
    """Outputs, and gradients of all or of the `wanted` inputs under a random cotangent, the same for every precision."""
    case = case.map(lambda y: y.detach().clone().requires_grad_())
    for i, y in enumerate(case.flat):
        y.requires_grad_(wanted(i))
    z, final = op(*case.arguments)
    outputs = [*z, final]
    generator = torch.Generator().manual_seed(99)
    cotangents = [torch.randn(y.shape, generator=generator).to(dtype or y.dtype).to(y) for y in outputs]
    inputs = [y for y in case.flat if y.requires_grad]
    return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, cotangents)


def compare(case, op, dtype=torch.float32, yardstick=mix_reference):
    exact = run(mix_reference, case.map(Tensor.double), dtype)
    for i, (got, want, truth) in enumerate(zip(run(op, case), run(yardstick, case), exact, strict=True)):
        assert got.dtype == want.dtype, i
        assert_parity(str(i), got, want, truth)


def assert_equal(xs, ys):
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        assert torch.equal(x, y), i


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(module, "mix_reference", lambda *_: pytest.fail("left to torch"))


@pytest.mark.parametrize("normed", [False, True], ids=["as it is", "normed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_SHAPE
def test_matches_reference(where, shape, dtype, normed, compiled):
    for mixes in (1, 6) if where.slow else (1, 2, 4, 6):
        compare(draw(*shape, mixes, dtype, normed=normed, device=where.device), form(where), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_gradients_it_is_the_same(shape, dtype, compiled):
    for normed in (False, True):
        case = draw(*shape, dtype=dtype, normed=normed)
        z, final = mix(*case.arguments)
        assert_equal((*z, final), run(form(CPU), case)[:7])


@FUSED
def test_long_sums_keep_their_precision(where):
    compare(draw(2, 70 if where.slow else 3000, 16, 2, device=where.device), form(where))


def in_float32(dtype):
    """The reference, computed in float32, on inputs of many types."""

    def op(x, last, mus, norm):
        norm = norm and Norm(norm.weight.float(), norm.bias.float(), EPS)
        z, final = mix_reference(x.float(), last.float(), [mu.float() for mu in mus], norm)
        return tuple(y.to(dtype) for y in z), final.to(dtype)

    return op


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@FUSED
def test_parameters_may_have_another_precision_than_activations(where, dtype, compiled):
    case = draw(2, 5 if where.slow else 20, 40, dtype=dtype, stored=DTYPES[dtype is torch.float32], device=where.device)
    compare(case, form(where), dtype, in_float32(dtype))
    several = case._replace(mus=[case.mus[0].float(), *(mu.bfloat16() for mu in case.mus[1:])])
    compare(several, form(where), dtype, in_float32(dtype))


@FUSED
def test_under_autocast_the_mixes_are_as_the_matrices_want_them(where):
    case = draw(2, 20, 40, device=where.device)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(2, 20, 40, generator=generator).to(where.device).bfloat16() for _ in range(6)]

    def gradients(z, cotangents, of):
        return torch.autograd.grad(z, of.flat, cotangents)

    plain, low = (case.map(lambda y: y.clone().requires_grad_()) for _ in range(2))
    z, final = module.apply(where.form, *plain.arguments)
    with torch.autocast(where.device, torch.bfloat16):
        rounded, end = module.apply(where.form, *low.arguments)
    assert final.dtype == end.dtype == torch.float32
    if where.slow:  # Triton's interpreter cuts bits off, where a GPU rounds
        torch.testing.assert_close([y.float() for y in rounded], list(z), rtol=2**-7, atol=0)
    else:
        assert_equal(rounded, [y.bfloat16() for y in z])
    assert_equal([end], [final])
    assert_equal(gradients(rounded, cotangents, low), gradients(z, [y.float() for y in cotangents], plain))


def test_is_its_formula():
    x, last, (mu,), _ = draw(1, 3, 4, 1, normed=False)
    (z,), end = mix(x, last, [mu])
    before = [last[0], x[0, 0], x[0, 1]]
    for t in range(3):
        torch.testing.assert_close(z[0, t], x[0, t] + (before[t] - x[0, t]) * mu[0, 0])
    assert torch.equal(end, x[:, -1])


def test_gradients_of_the_reference():
    def op(x, last, a, b, weight, bias):
        z, end = mix(x, last, [a, b], Norm(weight, bias, EPS))
        return *z, end

    assert torch.autograd.gradcheck(op, [y.double().requires_grad_() for y in draw(2, 3, 4, 2).flat])


@pytest.mark.parametrize("at", [1, 15, 16, 20])
@FUSED
def test_slices_with_carried_tokens_equal_the_whole(where, at, compiled):
    def sliced(x, last, mus, norm):
        first, between = form(where)(x[:, :at], last, mus, norm)
        second, end = form(where)(x[:, at:], between, mus, norm)
        return tuple(torch.cat(halves, 1) for halves in zip(first, second, strict=True)), end

    steps, at = (10, max(1, at // 4)) if where.slow else (40, at)  # its blocks are of 4 tokens, the C++'s of 16
    case = draw(2, steps, 24, 2, device=where.device)
    assert_equal(run(sliced, case)[:3], run(form(where), case)[:3])
    compare(case, sliced, yardstick=form(where))


@FUSED
def test_non_contiguous_inputs_and_cotangents_are_read_right(where):
    case = draw(2, 9 if where.slow else 20, 24, 2, device=where.device)
    strided = case.map(lambda y: torch.stack((y, y), -1)[..., 1])
    assert not strided.mus[0].is_contiguous()
    assert_equal(run(form(where), strided), run(form(where), case))
    if where.form == "cpu":
        assert_equal(mix(*strided.arguments)[0], mix(*case.arguments)[0])

    def alike(op):
        ys = case.map(lambda y: y.detach().requires_grad_())
        z, final = op(*ys.arguments)
        return torch.autograd.grad(sum(y.sum() for y in z) + final.sum(), ys.flat)  # cotangents are expanded

    for got, want in zip(alike(form(where)), alike(mix_reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def guarded(patched):
    """`guard` for every dtype, but not for what Triton's interpreter makes."""
    plain, _check = Tensor.new_empty, guard(patched)
    between = Tensor.new_empty

    def new_empty(self, *size, dtype=None, **others):
        if others:
            return plain(self, *size, dtype=dtype, **others)
        return between(self if dtype is None else torch.zeros(1, dtype=dtype), *size)

    patched.setattr(Tensor, "new_empty", new_empty)
    return _check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_SHAPE
def test_writes_all_and_nothing_past_the_ends(where, shape, dtype, monkeypatch):
    if where.device == "cuda":
        pytest.skip("the sentinels are for the CPU")
    case = draw(*shape, dtype=dtype)
    before = case.map(Tensor.clone)
    x, last, mus, (weight, bias) = case
    inputs = x, last, torch.stack([mu.view(-1) for mu in mus]), weight, bias
    for wanted in (True, False):
        with monkeypatch.context() as patched:
            check = guarded(patched)
            *z, final, statistics = module._forward(*inputs, EPS, dtype, where.form, True)
            module._backward(z, final, *inputs, statistics, where.form, wanted, wanted)
            assert check() == 13 + (wanted and where.form == "triton")
    if where.form == "cpu":
        with monkeypatch.context() as patched:
            check = guarded(patched)
            mix(*case.arguments)
            assert check() == len(mus) + 1
    assert_equal(case.flat, before.flat)


@FUSED
def test_reads_no_memory_that_it_has_not_written(where):
    cases = [draw(2, 9 if where.slow else 21, 40, 2, device=where.device, normed=normed) for normed in (False, True)]
    clean = [run(form(where), case) for case in cases]
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        assert torch.empty(3).isnan().all()
        for case, want in zip(cases, clean, strict=True):
            assert_equal(run(form(where), case), want)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_a_bit(threads, monkeypatch):
    case = draw(2, 600, 24)
    want = run(form(CPU), case)
    monkeypatch.setattr(build, "threads", lambda: threads)
    assert_equal(run(form(CPU), case), want)


@FUSED
def test_gradients_of_parameters_are_made_where_they_are_wanted(where, monkeypatch):
    case = draw(2, 3 if where.slow else 17, 24, 2, device=where.device)
    everything = run(form(where), case)[3:]
    made, backward = [], module._backward
    monkeypatch.setattr(module, "_backward", lambda *xs: made.append(xs[-2:]) or backward(*xs))
    for wanted in ({0}, {0, 1, 3}, {0, 4}, {0, 5}, {2}, set(range(6))):
        got = run(form(where), case, wanted=wanted.__contains__)[3:]
        for y, want in zip(got, [everything[i] for i in sorted(wanted)], strict=True):
            torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    assert made == [(False, False), (True, False), (False, True), (False, True), (True, False), (True, True)]


@FUSED
def test_the_mixes_are_not_kept_for_the_backward(where):
    case = draw(2, 21, 40, device=where.device).map(Tensor.requires_grad_)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.numel()) or y, lambda y: y):
        module.apply(where.form, *case.arguments)
    parameters = 8 * 40
    assert sum(kept) == case.x.numel() + case.last.numel() + parameters + 2 * 2 * 21


@FUSED
def test_is_a_sound_custom_op(where):
    for normed in (False, True):
        x, last, mus, norm = draw(1, 5, 8, 2, normed=normed, device=where.device).map(Tensor.requires_grad_)
        inputs = x, last, torch.stack([mu.view(-1) for mu in mus]).detach().requires_grad_(), *(norm or (None, None))
        torch.library.opcheck(module._forward.registered, (*inputs, EPS, torch.float32, where.form, True))
        inputs = [y if y is None else y.detach() for y in inputs]
        *z, final, statistics = module._forward(*inputs, EPS, torch.bfloat16, where.form, True)
        for of in ((True, normed), (False, False)):
            torch.library.opcheck(module._backward.registered, (z[:2], final, *inputs, statistics, where.form, *of))


@pytest.mark.parametrize("low", [False, True], ids=["", "autocast"])
def test_works_under_compile(low, compiled):
    def op(*arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return mix(*arguments)

    for normed in (False, True):
        case = draw(2, 20, 24, 2, normed=normed)
        fused = torch.compile(op, backend="aot_eager", fullgraph=True)
        assert_equal(run(fused, case), run(op, case))
        assert_equal(fused(*case.arguments)[0], op(*case.arguments)[0])


@FUSED
def test_works_under_checkpointing(where):
    def op(*arguments):
        return torch.utils.checkpoint.checkpoint(form(where), *arguments, use_reentrant=False)

    case = draw(2, 5 if where.slow else 20, 24, 2, device=where.device)
    assert_equal(run(op, case), run(form(where), case))


def test_op_names_the_form(monkeypatch):
    case = draw(2, 3, 8, 2)
    fused, plain = run(form(CPU), case), run(mix_reference, case)
    assert any(not torch.equal(x, y) for x, y in zip(fused, plain, strict=True))
    for op, want in (("auto", fused), ("cpu", fused), ("fla", fused), ("torch", plain), ("reference", plain)):
        assert_equal(run(partial(mix, op=op), case), want)
        assert_equal(mix(*case.arguments, op=op)[0], want[:2])
    with pytest.raises(ValueError, match=r"token_shift: op='cpu' for torch\.float64"):
        mix(*case.map(Tensor.double).arguments, op="cpu")
    monkeypatch.setattr(build, "library", lambda *_: None)
    assert_equal(run(mix, case), plain)
    assert_equal(mix(*case.arguments)[0], plain[:2])


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_other_devices(device):
    z, final = mix(*draw(2, 3, 4, 2).map(lambda y: y.to(device)).arguments)
    assert {y.device.type for y in (*z, final)} == {device}


def test_refuses_what_does_not_fit():
    x, last, mus, norm = draw(2, 3, 4, 7)
    with pytest.raises(ValueError, match="at most 6 mixes"):
        mix(x, last, mus, Norm(*norm, EPS))
    with pytest.raises(ValueError, match=r"last is \(1, 4\)"):
        mix(x, last[:1], mus[:6])
    with pytest.raises(ValueError, match=r"the parameters \[\(3,\)\] for x \(2, 3, 4\)"):
        mix(x, last, [mus[0][0, 0, :3]])
    with pytest.raises(ValueError, match=r"x is \(2, 0, 4\); it must be \(B, T, C\) with T of 1 or more"):
        mix(x[:, :0], last, mus[:6])


# That these tests prove something: each fault, planted in the code, must fail them.


def prove(op, steps):
    for normed in (False, True):
        compare(draw(2, steps, 20, 2, normed=normed), op)


CPP_FAULTS = {
    "wrong token before": ("normed(b * f.steps + start - 1, before);", "copy(last + b * size, before);"),
    "shares swapped": ("value + change * load(mu[m]", "value + change * load(mu[mixes - 1 - m]"),
    "the last token's gradient": ("asked = load(dfinal + b * size + i, size - i);", "asked = floats{};"),
    "nothing from the next block": ("            asked += load(dz[m]", "            asked += 0.0f * load(dz[m]"),
    "no mean": ("(load(dn + i) - mean - value * slope)", "(load(dn + i) - value * slope)"),
    "no slope": ("(load(dn + i) - mean - value * slope)", "(load(dn + i) - mean)"),
    "gradient before the norm's weight": ("scaled = own * load(weight + i, n)", "scaled = own"),
    "half a sum": ("part < parts; part++) total +=", "part < parts / 2; part++) total +="),
    "change not of normed tokens": ("(t ? normed(row - 1, i) : ", "(t ? load(x + at - size + i, n) : "),
}


def test_a_fault_in_the_cpp_is_caught(tmp_path, monkeypatch):
    sources = build.SOURCES
    monkeypatch.setattr(build, "FLAGS", build.FLAGS.replace("-O3", "-O0"))
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = {path.name: path.read_text() for path in (*sources.glob("*.h"), sources / "token_shift.cpp")}
    try:
        for name, (sound, broken) in {"none": ("floats", "floats"), **CPP_FAULTS}.items():
            found = sum(text.count(sound) for text in code.values())
            assert found == 1 or name == "none", f"the code has changed: plant {name} anew"
            for file, text in code.items():
                (tmp_path / file).write_text(text.replace(sound, broken))
            for cached in (build.library, build.function):
                cached.cache_clear()
            assert build.available("token_shift"), name
            if name == "none":
                prove(form(CPU), 40)
                continue
            with pytest.raises(AssertionError, match=r"error|NaN"):
                prove(form(CPU), 40)
    finally:
        for cached in (build.library, build.function):
            cached.cache_clear()


TRITON_FAULTS = {
    "wrong token before": ("b * steps + start - 1, weight", "b * steps + start, weight"),
    "last token": ("    if start + TOKENS >= steps:\n        _write(final", "    if start == 0:\n        _write(final"),
    "nothing from the next block": (
        "            after += _read(dz[m], (b * steps + start + TOKENS) * size + c, inside)",
        "            after += 0 * _read(dz[m], (b * steps + start + TOKENS) * size + c, inside)",
    ),
    "no slope": (" - value * (tl.sum(own * value, 0) / size)", ""),
    "next sequence's token": ("inside & (t + 1 < steps)) * share", "inside & (row + 1 < rows)) * share"),
    "no last token": ("tl.where(t > 0, before, _read(last", "tl.where(t >= 0, before, _read(last"),
    "variance of the padding": ("value = tl.where(c < size, value - mean, 0.0)", "value = value - mean"),
}


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="the interpreter shows them")
def test_the_sound_triton_passes():
    prove(form(INTERPRETER), 9)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="the interpreter shows them")
@pytest.mark.parametrize("fault", TRITON_FAULTS)
def test_a_fault_in_triton_is_caught(fault, tmp_path, monkeypatch):
    from kernels import token_shift_triton

    code, (sound, broken) = Path(token_shift_triton.__file__).read_text(), TRITON_FAULTS[fault]
    assert code.count(sound) == 1, "the code has changed: plant the fault anew"
    file = tmp_path / "token_shift_broken.py"
    file.write_text(code.replace(sound, broken))
    spec = importlib.util.spec_from_file_location("token_shift_broken", file)
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "token_shift_broken", other)
    spec.loader.exec_module(other)
    for name in ("forward", "backward"):
        monkeypatch.setattr(token_shift_triton, name, getattr(other, name))
    with pytest.raises(AssertionError, match=r"error|NaN"):
        prove(form(INTERPRETER), 9)
