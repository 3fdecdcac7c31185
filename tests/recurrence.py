"""What the tests of the recurrences share: gradients under one cotangent, parity, and the contract that all forms keep."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from parity import assert_parity
from sentinels import guard
from torch import Tensor

from kernels import build
from kernels.choice import Form

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

Run = Callable[..., tuple[Tensor, Tensor]]


class Where(NamedTuple):
    """A form, and the device of what it works on. On a CPU, CUDA runs under its shim and Triton in its interpreter, slowly."""

    form: Form
    device: str

    @property
    def slow(self) -> bool:
        return self.device == "cpu" and self.form in ("cuda", "triton")


NATIVE = [Where("torch", "cpu"), Where("cpu", "cpu")]
EVERYWHERE = [
    *NATIVE, Where("cuda", "cpu"), Where("triton", "cpu"),
    Where("torch", "cuda"), Where("cuda", "cuda"), Where("triton", "cuda"),
]  # fmt: skip


def param(where: Where, *others: Any) -> Any:
    """A case of a test, named for where it runs; those on a GPU are marked, and those in Triton's interpreter as slow."""
    name = "-".join(map(str, (where.form, where.device, *others)))
    marks = [pytest.mark.gpu] if where.device == "cuda" else [pytest.mark.slow] if where.form == "triton" else []
    return pytest.param(where, *others, id=name, marks=marks)


def everywhere(name: str, values: Iterable[Any], small: Callable[[Any], bool]) -> Any:
    """Parametrise a test by `where` and `name`: every form with every value, the slow ones with those that are `small`."""
    cases = [param(w, value) for w in EVERYWHERE for value in values if not w.slow or small(value)]
    return pytest.mark.parametrize(("where", name), cases)


def run(op: Run, xs: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of all inputs under a random cotangent, which is the same for every precision."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    y, final = op(*xs)
    generator = torch.Generator().manual_seed(99)
    dtype = dtype or y.dtype
    dy, dfinal = (torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in (y, final))
    return y.detach(), final.detach(), *torch.autograd.grad((y, final), xs, (dy, dfinal))


def compare(
    names: Iterable[str], op: Run, yardstick: Run, truth: Run, xs: Sequence[Tensor], *, narrow: bool = False
) -> tuple[Tensor, ...]:
    """Assert that results and gradients of `op` are as good as those of `yardstick` in the same precision; return them."""
    got, want = run(op, xs), run(yardstick, xs)
    judge(names, got, want, run(truth, [x.double() for x in xs], xs[0].dtype), narrow=narrow)
    return got


def judge(
    names: Iterable[str],
    fast: Sequence[Tensor],
    slow: Sequence[Tensor],
    exact: Sequence[Tensor],
    *,
    narrow: bool = False,
) -> None:
    """Assert parity of results, the first of which is an output.

    Tensor cores round the operands of products. On bfloat16 inputs these roundings are less than those of the inputs; a float32
    result of a form that uses them is then judged as a bfloat16 one, if `narrow`.
    """
    narrow = narrow and fast[0].dtype == torch.bfloat16
    for name, got, want, right in zip(names, fast, slow, exact, strict=True):
        assert got.dtype == want.dtype, name
        assert_parity(name, *(x.bfloat16() if narrow else x for x in (got, want)), right)


def run_backwards(op: Run, xs: Sequence[Tensor], *sources: str) -> tuple[Tensor, ...]:
    """As `run`, threads and blocks of CUDA's stand-in in the reverse order: where a barrier is missing, results differ."""
    orders = [build.function(source, "rwkv_shim_order", "q", "host") for source in sources]
    try:
        for order in orders:
            order(1)
        return run(op, xs)
    finally:
        for order in orders:
            order(0)


def amid_nan(x: Tensor, before: int = 8) -> Tensor:
    """Equal to x, with so many NaN before it in memory, and 8 behind it."""
    whole = x.new_full((before + x.numel() + 8,), torch.nan)
    inner = whole[before:-8].view(x.shape)
    return inner.copy_(x)


def assert_guarded(
    form: ModuleType, xs: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch, *, all_written: bool = True
) -> None:
    """Assert that a form's functions read nothing before they write it, and write nothing beyond their tensors."""
    dy, dfinal = torch.randn(xs[0].shape).to(xs[0]), torch.randn(xs[-1].shape)

    def both() -> tuple[Tensor, ...]:
        y, final, kept = form.forward(*xs, True)
        return y, final, *form.backward(*xs[:-1], kept, dy, dfinal)

    clean = both()
    with monkeypatch.context() as patch:
        check = guard(patch)
        guarded = both()
    assert check(all_written) >= len(clean)
    assert all(torch.equal(x, y) for x, y in zip(clean, guarded, strict=True))


DECAYS = {"usual": (-6.0, 2.0), "any": (-15.0, 15.0), "strongest": (15.0, 15.0), "none": (-15.0, -15.0)}
"""Ranges of w_raw."""


def draw_wkv7(batch, steps, heads, size, dtype=torch.float32, device="cpu", decay="usual", alike=0.0):
    """Inputs like RWKV-7's: a is a negative unit vector, b that vector times a learning rate in (0, 1).

    With `alike` near 1 all keys point nearly the same way.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch, steps, heads, size)
    r, v, rate, constant = (_normal(generator, *s) for s in (shape, shape, shape, (heads, size)))
    k = (1 - alike) * _normal(generator, *shape) + alike * constant
    kappa = torch.nn.functional.normalize(k, dim=-1)
    w_raw = _uniform(generator, *DECAYS[decay], *shape)
    xs = [r, w_raw, k, v, -kappa, kappa * torch.sigmoid(rate)]
    return _as(xs, _normal(generator, batch, heads, size, size), dtype, device)


def draw_wkv6(batch, steps, heads, size, dtype=torch.float32, device="cpu", decay="usual"):
    """Inputs like RWKV-6's."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, steps, heads, size)
    r, k, v = (_normal(generator, *shape) for _ in range(3))
    xs = [r, k, v, _uniform(generator, *DECAYS[decay], *shape), _normal(generator, heads, size)]
    return _as(xs, _normal(generator, batch, heads, size, size), dtype, device)


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _uniform(generator, low, high, *shape):
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def _as(xs, state, dtype, device):
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(device, dtype) for x in xs] + [state.to(device, state_dtype)]


class Contract:
    """Tests that every form of a recurrence passes; a subclass says which recurrence. The state is the last input."""

    module: ModuleType
    op: Run
    reference: Run
    inputs: tuple[str, ...]
    timed: tuple[str, ...]
    """the inputs that have a time axis; they come first"""

    @staticmethod
    def draw(batch: int, steps: int, *, device: str = "cpu") -> list[Tensor]:
        """Small float32 inputs like the model's."""
        raise NotImplementedError

    @pytest.fixture(params=[param(where) for where in EVERYWHERE])
    def where(self, request: pytest.FixtureRequest) -> Where:
        return request.param

    def form(self, where: Where) -> Run:
        return partial(self.module.apply, where.form)

    @property
    def names(self) -> tuple[str, ...]:
        return "y", "final", *(f"d{name}" for name in self.inputs)

    def compare(
        self, xs: Sequence[Tensor], op: Run, yardstick: Run | None = None, *, where: Where | None = None
    ) -> None:
        """Assert that `op` is as good as `yardstick`, or the reference, in the same precision."""
        ops = (self.comparable(f, xs) for f in (op, yardstick or self.reference, self.reference))
        compare(self.names, *ops, xs, narrow=bool(where and where.form in ("cuda", "triton")))

    def comparable(self, op: Run, _xs: Sequence[Tensor]) -> Run:
        """The op, its outputs such that equal meaning is equal numbers."""
        return op

    def assert_equal(self, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        assert len(got) == len(want)
        for name, x, y in zip(self.names, got, want, strict=False):
            assert torch.equal(x, y), name

    @pytest.mark.parametrize("at", [1, 16, 21])
    def test_slices_with_carried_state_equal_the_whole(self, at, where):
        """Outputs and all gradients, that of the first state among them: it flows back through both slices."""
        timed, op = len(self.timed), self.form(where)

        def sliced(*xs):
            first, state = op(*(x[:, :at] for x in xs[:timed]), *xs[timed:])
            second, state = op(*(x[:, at:] for x in xs[:timed]), *xs[timed:-1], state)
            return torch.cat((first, second), 1), state

        self.compare(self.draw(1 if where.slow else 2, 37, device=where.device), sliced, op)

    def test_is_a_sound_custom_op(self, where):
        xs = [x.requires_grad_() for x in self.draw(1, 20, device=where.device)]
        torch.library.opcheck(self.module._forward.registered, (*xs, where.form, True))
        xs = [x.detach() for x in xs]
        torch.library.opcheck(self.module._forward.registered, (*xs, where.form, False))
        y, final, kept = self.module._forward(*xs, where.form, True)
        cotangents = (torch.randn_like(y), torch.randn_like(final))
        torch.library.opcheck(self.module._backward.registered, (*xs[:-1], kept, *cotangents, where.form))

    @pytest.mark.parametrize("steps", [1, 2, 20])
    def test_non_contiguous_inputs_are_read_right(self, steps, where):
        xs = self.draw(2, steps, device=where.device)
        strided = [x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))) for x in xs]
        assert not strided[0].is_contiguous()
        self.assert_equal(run(self.form(where), strided), run(self.form(where), xs))

    def test_works_under_compile(self, where):
        xs, op = self.draw(1, 20, device=where.device), self.form(where)
        compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
        self.assert_equal(run(compiled, xs), run(op, xs))

    def test_choosing_works_under_compile(self):
        xs = self.draw(1, 20)
        compiled = torch.compile(self.op, backend="aot_eager", fullgraph=True)
        self.assert_equal(run(compiled, xs), run(self.op, xs))

    def test_works_under_checkpointing(self, where):
        op = self.form(where)

        def checkpointed(*xs):
            return torch.utils.checkpoint.checkpoint(op, *xs, use_reentrant=False)

        xs = self.draw(1, 20, device=where.device)
        self.assert_equal(run(checkpointed, xs), run(op, xs))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(("steps", "op"), [(1, "reference"), (1, "auto"), (20, "auto"), (20, "torch")])
    def test_autocast_does_not_reach_it(self, steps, op, device):
        """Mixed precision is for the model's matrices: the state stays as exact as it is without."""
        xs = self.draw(2, steps, device=device)
        chosen = partial(self.op, op=op)
        plain = run(chosen, xs)
        with torch.autocast(device, torch.bfloat16):
            mixed = run(chosen, xs)
        outputs = 2 if op == "reference" else len(plain)  # which is plain operations, whose backward is the caller's
        self.assert_equal(mixed[:outputs], plain[:outputs])

    @pytest.fixture
    def poisoned(self):
        """torch.empty gives NaN."""
        assert torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("steps", [1, 2, 21])
    def test_reads_no_memory_that_it_has_not_written(self, steps, where, request):
        xs = self.draw(2, steps, device=where.device)
        clean = run(self.form(where), xs)
        request.getfixturevalue("poisoned")
        self.assert_equal(run(self.form(where), xs), clean)

    @pytest.mark.parametrize("where", [param(w) for w in EVERYWHERE if w.device == "cpu" and w.form != "torch"])
    @pytest.mark.parametrize("steps", [1, 19])
    def test_writes_all_of_its_results_and_nothing_past_their_ends(self, steps, where, monkeypatch):
        xs = self.draw(2, steps)
        check = guard(monkeypatch)
        y, final, kept = self.module._implementation(where.form).forward(*xs, True)
        grads = self.module._implementation(where.form).backward(*xs[:-1], kept, y.clone(), final.clone())
        monkeypatch.undo()
        assert not any(x.isnan().any() for x in (y, final, *grads))
        assert check(all_written=False) >= 6

    def test_its_inputs_are_left_as_they_were(self, where):
        xs = self.draw(2, 21, device=where.device)
        before = [x.clone() for x in xs]
        torch.autograd.grad(self.form(where)(*[x.requires_grad_() for x in xs])[0].sum(), xs)
        assert all(torch.equal(x, kept) for x, kept in zip(xs, before, strict=True))

    def test_memory_kept_for_the_backward(self, where):
        """The inputs, and at most a sixteenth of the states: nothing of the size of a state per step."""
        steps = 128
        xs = [x.requires_grad_() for x in self.draw(1, steps, device=where.device)]
        kept = []

        def pack(x):
            kept.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self.form(where)(*xs)
        *inputs, state = (x.numel() * x.element_size() for x in xs)
        assert sum(inputs) < sum(kept) <= sum(inputs) + (steps // 16 + 1) * state

    @pytest.mark.parametrize("threads", [2, 3, 16])
    def test_threads_do_not_change_a_bit(self, threads, monkeypatch):
        xs, op = self.draw(2, 37), self.form(Where("cpu", "cpu"))
        want = run(op, xs)
        monkeypatch.setattr(build, "threads", lambda: threads)
        self.assert_equal(run(op, xs), want)

    def test_auto_takes_the_fastest_that_works(self, monkeypatch):
        """The compiled form where there is one; else chunks, or for one step the equations."""
        for steps in (1, 2):
            xs = self.draw(1, steps)
            self.assert_equal(self.op(*xs), self.module.apply("cpu", *xs))
            exact = [x.double() for x in xs]
            self.assert_equal(self.op(*exact), self.module.apply("torch" if steps > 1 else "reference", *exact))
        monkeypatch.setattr(build, "available", lambda *_: False)
        for steps in (1, 2):
            xs = self.draw(1, steps)
            self.assert_equal(self.op(*xs), self.module.apply("torch" if steps > 1 else "reference", *xs))

    def test_what_can_not_work_is_refused(self):
        xs = self.draw(1, 4)
        for form in ("cuda", "triton") if not torch.cuda.is_available() else ():
            with pytest.raises(ValueError, match=f"op='{form}' for torch.float32 on cpu; .*; or say op='auto'"):
                self.op(*xs, op=form)
        with pytest.raises(ValueError, match=r"op='cpu' for torch\.float64 on cpu; it works on float32 and bfloat16"):
            self.op(*(x.double() for x in xs), op="cpu")
        with pytest.raises(ValueError, match="form='assembler'; it must be one of"):
            self.module.apply("assembler", *xs)

    def test_each_gradient_has_its_own_input_s_precision(self, where):
        """Under autocast parameters are float32 beside a bfloat16 k: their gradients must not be rounded to bfloat16."""
        xs = self.draw(1, 20, device=where.device)
        low = [name in ("r", "k", "v") for name in self.inputs]
        xs = [(x.bfloat16() if is_low else x).requires_grad_() for x, is_low in zip(xs, low, strict=True)]
        y, _ = self.form(where)(*xs)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        grads = torch.autograd.grad(y, xs, dy)
        assert [grad.dtype for grad in grads] == [x.dtype for x in xs]
        exact = [x.detach().double().requires_grad_() for x in xs]
        wanted = torch.autograd.grad(self.reference(*exact)[0], exact, dy.double())
        for got, want, is_low in zip(grads, wanted, low, strict=True):
            if not is_low:
                torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)

    def test_other_precisions_are_widened(self, where):
        """float16, as it comes from a GPU's mixed precision: its products and sums are float32's."""
        xs = [x.half() for x in self.draw(1, 20, device=where.device)[:-1]]
        state = self.draw(1, 20, device=where.device)[-1]
        got = run(self.form(where), (*xs, state))
        want = run(self.form(where), (*(x.float() for x in xs), state), torch.float16)
        assert got[0].dtype == torch.float16
        torch.testing.assert_close(got[0], want[0].half(), atol=1e-3, rtol=2e-3)
        for name, x, y in zip(self.names[1:], got[1:], want[1:], strict=True):
            torch.testing.assert_close(x.float(), y, atol=1e-2, rtol=1e-2, msg=name)
