"""What the tests of the recurrences share: gradients under one cotangent, parity, and the contract that all keep."""

from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from parity import assert_parity
from torch import Tensor

from kernels.choice import choose

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

Run = Callable[..., tuple[Tensor, Tensor]]


def run(op: Run, xs: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of all inputs under a random cotangent, which is the same for every precision."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    y, final = op(*xs)
    generator = torch.Generator().manual_seed(99)
    dtype = dtype or y.dtype
    dy, dfinal = (torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in (y, final))
    return y.detach(), final.detach(), *torch.autograd.grad((y, final), xs, (dy, dfinal))


class Contract:
    """Tests that every recurrence passes; a subclass says which. The state is the last input."""

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

    def chunked(self, *xs: Tensor) -> tuple[Tensor, Tensor]:
        return self.op(*xs, op="torch")

    @property
    def names(self) -> tuple[str, ...]:
        return "y", "final", *(f"d{name}" for name in self.inputs)

    def compare(self, xs: Sequence[Tensor], op: Run | None = None, yardstick: Run | None = None) -> None:
        """Assert that `op`, or the chunked form, is as good as `yardstick`, or the reference, in the same precision."""
        op, yardstick, truth = (
            self.comparable(f, xs) for f in (op or self.chunked, yardstick or self.reference, self.reference)
        )
        fast, slow = run(op, xs), run(yardstick, xs)
        exact = run(truth, [x.double() for x in xs], xs[0].dtype)
        for name, got, want, right in zip(self.names, fast, slow, exact, strict=True):
            assert got.dtype == want.dtype, name
            assert_parity(name, got, want, right)

    def comparable(self, op: Run, _xs: Sequence[Tensor]) -> Run:
        """The op, its outputs such that equal meaning is equal numbers."""
        return op

    def assert_equal(self, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        assert len(got) == len(want)
        for name, x, y in zip(self.names, got, want, strict=False):
            assert torch.equal(x, y), name

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("at", [1, 16, 21, 39])
    def test_slices_with_carried_state_equal_the_whole(self, at, device):
        """Outputs and all gradients, that of the first state among them: it flows back through both slices."""
        timed = len(self.timed)

        def sliced(*xs):
            first, state = self.chunked(*(x[:, :at] for x in xs[:timed]), *xs[timed:])
            second, state = self.chunked(*(x[:, at:] for x in xs[:timed]), *xs[timed:-1], state)
            return torch.cat((first, second), 1), state

        self.compare(self.draw(2, 40, device=device), sliced, self.chunked)

    def test_is_a_sound_custom_op(self):
        xs = [x.requires_grad_() for x in self.draw(1, 20)]
        torch.library.opcheck(self.module._forward, tuple(xs))
        xs = [x.detach() for x in xs]
        y, final, kept = self.module._forward(*xs)
        torch.library.opcheck(self.module._backward, (*xs[:-1], kept, torch.randn_like(y), torch.randn_like(final)))

    @pytest.mark.parametrize("steps", [1, 2, 20])
    def test_non_contiguous_inputs_are_read_right(self, steps):
        xs = self.draw(2, steps)
        strided = [x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))) for x in xs]
        assert not strided[0].is_contiguous()
        self.assert_equal(run(self.chunked, strided), run(self.chunked, xs))

    def test_works_under_compile(self):
        xs = self.draw(1, 20)
        compiled = torch.compile(self.chunked, backend="aot_eager", fullgraph=True)
        self.assert_equal(run(compiled, xs), run(self.chunked, xs))

    def test_works_under_checkpointing(self):
        def checkpointed(*xs):
            return torch.utils.checkpoint.checkpoint(self.chunked, *xs, use_reentrant=False)

        xs = self.draw(1, 20)
        self.assert_equal(run(checkpointed, xs), run(self.chunked, xs))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("steps", [1, 20])
    def test_autocast_does_not_reach_it(self, steps, device):
        """Mixed precision is for the model's matrices: the state stays as exact as it is without."""
        xs = self.draw(2, steps, device=device)
        plain = run(self.op, xs)
        with torch.autocast(device, torch.bfloat16):
            mixed = run(self.op, xs)
        outputs = len(plain) if steps > 1 else 2  # one step is plain operations, whose backward is the caller's
        self.assert_equal(mixed[:outputs], plain[:outputs])

    @pytest.fixture
    def poisoned(self):
        """torch.empty gives NaN."""
        assert torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        assert torch.empty(3).isnan().all()
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("steps", [2, 21])
    def test_reads_no_memory_that_it_has_not_written(self, steps, request):
        xs = self.draw(2, steps)
        clean = run(self.chunked, xs)
        request.getfixturevalue("poisoned")
        self.assert_equal(run(self.chunked, xs), clean)

    def test_its_inputs_are_left_as_they_were(self):
        xs = self.draw(2, 21)
        before = [x.clone() for x in xs]
        torch.autograd.grad(self.op(*[x.requires_grad_() for x in xs])[0].sum(), xs)
        assert all(torch.equal(x, kept) for x, kept in zip(xs, before, strict=True))

    def test_memory_kept_for_the_backward(self):
        """The inputs, and the state once for each chunk: nothing of the size of a state per step."""
        steps = 4 * self.module.CHUNK
        xs = [x.requires_grad_() for x in self.draw(2, steps)]
        kept = []

        def pack(x):
            kept.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self.op(*xs)
        *inputs, state = (x.numel() * x.element_size() for x in xs)
        assert sum(inputs) < sum(kept) <= sum(inputs) + 5 * state

    def test_auto_takes_the_chunks_for_more_than_one_step(self):
        for steps, same in ((1, self.reference), (2, self.chunked)):
            xs = self.draw(2, steps)
            assert choose("auto", xs[0], steps) == ("torch" if same == self.chunked else "reference")
            self.assert_equal(self.op(*xs), same(*xs))

    def test_each_gradient_has_its_own_input_s_precision(self):
        """Under autocast parameters are float32 beside a bfloat16 k: their gradients must not be rounded to bfloat16."""
        xs = self.draw(1, 20)
        low = [name in ("r", "k", "v") for name in self.inputs]
        xs = [(x.bfloat16() if is_low else x).requires_grad_() for x, is_low in zip(xs, low, strict=True)]
        y, _ = self.chunked(*xs)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        grads = torch.autograd.grad(y, xs, dy)
        assert [grad.dtype for grad in grads] == [x.dtype for x in xs]
        exact = [x.detach().double().requires_grad_() for x in xs]
        wanted = torch.autograd.grad(self.reference(*exact)[0], exact, dy.double())
        for got, want, is_low in zip(grads, wanted, low, strict=True):
            if not is_low:
                torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)
