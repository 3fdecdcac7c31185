import math

import pytest
import torch
from recurrence import Contract, everywhere

from kernels import wkv4 as module
from kernels.wkv4 import NOTHING, wkv4, wkv4_reference
from kernels.wkv4_torch import CHUNK

# batch, steps, channels: no chunk length divides most of them
SHAPES = [
    (1, 1, 8), (2, 2, 16), (1, 15, 32), (2, 16, 64), (1, 17, 48), (1, 31, 8), (2, 32, 24), (3, 33, 16), (1, 63, 128),
    (1, 64, 8), (2, 100, 64), (1, 300, 32), (2, 21, 5), (1, 40, 70), (1, 1000, 64),
]  # fmt: skip
DECAYS = {"usual": (-5.0, 3.0), "any": (-15.0, 15.0), "strongest": (25.0, 25.0), "none": (-15.0, -15.0)}


def draw(
    batch, steps, channels, dtype=torch.float32, device="cpu", decay="usual", largest_key=None, start=False, seed=0
):
    """Inputs like the model's, or with keys up to `largest_key`; the state of a text that has begun, or at its start."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    shape = (batch, steps, channels)
    k = randn(*shape) if largest_key is None else uniform(-largest_key, largest_key, *shape)
    xs = [k, randn(*shape), uniform(*DECAYS[decay], channels), randn(channels)]
    a, b, p = randn(batch, channels), 0.1 + randn(batch, channels).abs(), randn(batch, channels)
    if start:
        a, b, p = torch.zeros_like(a), torch.zeros_like(b), torch.full_like(p, NOTHING)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(device, dtype) for x in xs] + [torch.stack((a, b, p), 1).to(device, state_dtype)]


class TestWkv4(Contract):
    module = module
    op = staticmethod(wkv4)
    reference = staticmethod(wkv4_reference)
    inputs = ("k", "v", "w", "u", "state")
    timed = ("k", "v")

    @staticmethod
    def draw(batch, steps, *, device="cpu"):
        return draw(batch, steps, 16, device=device)

    def comparable(self, op, xs):
        """The last state in a unit that does not depend on how p was rounded."""
        unit = wkv4_reference(*(x.double() for x in xs))[1][:, 2:].round()

        def in_unit(*ys):
            y, final = op(*ys)
            return y, final[:, :2] * torch.exp(final[:, 2:].detach() - unit.to(final))

        return in_unit

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @everywhere("shape", SHAPES, lambda s: s[0] * s[1] <= 70)
    def test_matches_reference(self, where, shape, dtype):
        self.compare(draw(*shape, dtype, where.device), self.form(where))

    @everywhere("shape", [(1, 1, 8), (2, 33, 16), (1, 70, 64)], lambda _: True)
    def test_matches_reference_from_the_start_of_a_text(self, where, shape):
        self.compare(draw(*shape, device=where.device, start=True), self.form(where))

    @pytest.mark.parametrize("largest_key", [1.0, 50.0])
    @pytest.mark.parametrize("decay", ["usual", "any", "strongest", "none"])
    @everywhere("shape_and_start", [((2, 37, 64), True), ((1, 100, 128), False)], lambda case: case[1])
    def test_matches_reference_under_any_decay_and_large_keys(self, where, shape_and_start, decay, largest_key):
        shape, start = shape_and_start
        xs = draw(*shape, device=where.device, decay=decay, largest_key=largest_key, start=start)
        self.compare(xs, self.form(where))

    @pytest.mark.parametrize("start", [False, True])
    def test_reference_is_the_average(self, start):
        """By its definition, one number at a time."""
        k, v, w, u, state = xs = draw(1, 5, 1, torch.float64, start=start)
        y, final = wkv4_reference(*xs)
        K, V, log_decay, bonus = k.flatten().tolist(), v.flatten().tolist(), -math.exp(w.item()), u.item()
        a, b, p = state.flatten().tolist()
        for t in range(6):
            weights = [math.exp((t - 1 - s) * log_decay + K[s]) for s in range(t)]
            alpha = a * math.exp(p + t * log_decay) + sum(weight * V[s] for s, weight in enumerate(weights))
            beta = b * math.exp(p + t * log_decay) + sum(weights)
            if t < 5:
                now = math.exp(bonus + K[t])
                assert y[0, t, 0].item() == pytest.approx((alpha + now * V[t]) / (beta + now), rel=1e-12)
        a, b, p = final.flatten().tolist()
        assert (a * math.exp(p), b * math.exp(p)) == pytest.approx((alpha, beta), rel=1e-12)

    @pytest.mark.parametrize("op", ["torch", "reference"])
    def test_float64_gradients_match_finite_differences(self, op):
        """The last state's sums, in one unit: in its own, they would seem to change where the unit does."""
        *xs, state = draw(1, CHUNK + 3 if op == "torch" else 4, 2, torch.float64)
        a, b, p = state.unbind(1)

        def sums(k, v, w, u, a, b):
            y, final = wkv4(k, v, w, u, torch.stack((a, b, p), 1), op=op)
            return y, final[:, :2] * torch.exp(final[:, 2:].detach())

        assert torch.autograd.gradcheck(sums, [x.requires_grad_() for x in (*xs, a, b)])

    @pytest.mark.parametrize("op", ["torch", "reference"])
    def test_the_unit_of_the_state_changes_nothing(self, op):
        *xs, state = draw(2, 40, 16, torch.float64)
        other = torch.cat((state[:, :2] * math.exp(-3), state[:, 2:] + 3), 1)
        (y, final), (same_y, same_final) = wkv4(*xs, state, op=op), wkv4(*xs, other, op=op)
        torch.testing.assert_close(y, same_y)
        torch.testing.assert_close(final[:, :2] * final[:, 2:].exp(), same_final[:, :2] * same_final[:, 2:].exp())

    @pytest.mark.parametrize("op", ["cpu", "torch", "reference"])
    def test_the_unit_of_the_state_has_no_gradient(self, op):
        *xs, state = self.draw(2, 40)
        y, final = wkv4(*xs, state.requires_grad_(), op=op)
        (grad,) = torch.autograd.grad(y.sum() + final[:, 2].sum(), state)
        assert grad[:, 2].eq(0).all()
        assert grad[:, :2].ne(0).any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"v": torch.zeros(1, 3, 16)}, r"v is \(1, 3, 16\) but k is \(1, 4, 16\); both are \(B, T, C\)"),
            ({"w": torch.zeros(1, 1, 16)}, r"w is \(1, 1, 16\); it must be \(16,\), .*; flatten it"),
            ({"u": torch.zeros(8)}, r"u is \(8,\); it must be \(16,\)"),
            ({"state": torch.zeros(3, 16)}, r"state is \(3, 16\); it must be \(1, 3, 16\); expand it"),
            ({"state": torch.zeros(2, 3, 16)}, r"state is \(2, 3, 16\); it must be \(1, 3, 16\)"),
            ({"state": torch.zeros(1, 3, 16, dtype=torch.bfloat16)}, r"state is torch.bfloat16; .*; pass state.float"),
            ({"k": torch.zeros(1, 4, 2, 8)}, r"k is \(1, 4, 2, 8\); it must be \(B, T, C\)"),
            ({"k": torch.zeros(1, 0, 16), "v": torch.zeros(1, 0, 16)}, r"k is \(1, 0, 16\); .*T of 1 or more"),
        ],
    )
    @pytest.mark.parametrize("op", ["auto", "torch", "reference"])
    def test_refuses_what_does_not_fit(self, change, message, op):
        xs = dict(zip(self.inputs, self.draw(1, 4), strict=True)) | change
        with pytest.raises(ValueError, match=message):
            wkv4(**xs, op=op)
