import math

import pytest
import torch
from recurrence import Contract, everywhere, run
from recurrence import draw_wkv6 as draw

from kernels import wkv6 as module
from kernels.wkv6 import wkv6, wkv6_reference
from kernels.wkv6_torch import CHUNK

# batch, steps, heads, head size: no chunk length divides most of them
SHAPES = [
    (1, 1, 1, 8), (2, 2, 2, 16), (1, 15, 2, 32), (2, 16, 1, 64), (1, 17, 3, 16), (3, 33, 2, 8), (1, 63, 1, 128),
    (2, 100, 2, 64), (1, 300, 2, 32), (2, 21, 3, 5), (1, 18, 1, 40), (1, 17, 1, 70), (1, 20, 1, 256), (1, 1000, 1, 64),
]  # fmt: skip


class TestWkv6(Contract):
    module = module
    op = staticmethod(wkv6)
    reference = staticmethod(wkv6_reference)
    inputs = ("r", "k", "v", "w_raw", "u", "state")
    timed = ("r", "k", "v", "w_raw")

    @staticmethod
    def draw(batch, steps, *, device="cpu"):
        return draw(batch, steps, 2, 8, device=device)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @everywhere("shape", SHAPES, lambda s: s[0] * s[1] * s[2] <= 70 and s[3] <= 64)
    def test_matches_reference(self, where, shape, dtype):
        self.compare(draw(*shape, dtype, where.device), self.form(where), where=where)

    @pytest.mark.parametrize("decay", ["any", "strongest", "none"])
    @everywhere("shape", [(2, 37, 2, 16), (1, 130, 1, 64)], lambda s: s[3] == 16)
    def test_matches_reference_under_strong_and_weak_decay(self, where, shape, decay):
        self.compare(draw(*shape, device=where.device, decay=decay), self.form(where))

    def test_a_weak_decay_after_a_strong_one_keeps_its_digits(self, where):
        """A difference of running sums would have none left: e^12 is 160000, to the nearest 1/64."""
        xs = draw(1, 32, 1, 8, device=where.device, decay="none")
        xs[3][:, ::7], xs[3][:, 1::7] = 12.0, -4.0
        self.compare(xs, self.form(where))

    def test_one_decay_may_be_expanded_over_the_steps(self, where):
        """As RWKV-5 does: its gradient is the sum over batch and steps."""
        r, k, v, w_raw, u, state = draw(2, 37, 2, 8, device=where.device)

        def static(r, k, v, w, u, state):
            return self.form(where)(r, k, v, w.expand(r.shape), u, state)

        xs = [r, k, v, w_raw[0, 0], u, state]
        got = run(static, xs)
        whole = [x.double() for x in xs]
        whole[3] = whole[3].expand(whole[0].shape).contiguous()
        *wanted, dw_raw, du, dstate = run(wkv6_reference, whole, torch.float32)
        for name, x, y in zip(self.names, got, (*wanted, dw_raw.sum((0, 1)), du, dstate), strict=True):
            torch.testing.assert_close(x.double(), y, atol=1e-4, rtol=1e-5, msg=name)

    def test_reference_is_the_recurrence(self):
        """By its definition, one number at a time."""
        xs = draw(1, 3, 1, 4, torch.float64)
        y, final = wkv6_reference(*xs)
        r, k, v, w_raw, u, state = xs
        S, U = state[0, 0].tolist(), u[0].tolist()
        for t in range(3):
            R, K, V, W = (x[0, t, 0].tolist() for x in (r, k, v, w_raw))
            bonus = sum(R[j] * U[j] * K[j] for j in range(4))
            expected = [sum(S[i][j] * R[j] for j in range(4)) + bonus * V[i] for i in range(4)]
            S = [[S[i][j] * math.exp(-math.exp(W[j])) + V[i] * K[j] for j in range(4)] for i in range(4)]
            torch.testing.assert_close(y[0, t, 0], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(final[0, 0], torch.tensor(S, dtype=torch.float64))

    def test_float64_gradients_match_finite_differences(self):
        xs = [x.requires_grad_() for x in draw(1, CHUNK + 3, 1, 2, torch.float64)]
        assert torch.autograd.gradcheck(lambda *xs: wkv6(*xs, op="torch"), xs)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"k": torch.zeros(1, 3, 2, 8)}, r"k is \(1, 3, 2, 8\) but r is \(1, 4, 2, 8\); all four share"),
            ({"w_raw": torch.zeros(2, 8)}, r"w_raw is \(2, 8\) but r is .*; reshape or expand it"),
            ({"u": torch.zeros(1, 1, 2, 8)}, r"u is \(1, 1, 2, 8\); it must be \(2, 8\)"),
            ({"state": torch.zeros(2, 8, 8)}, r"state is \(2, 8, 8\); it must be \(1, 2, 8, 8\)"),
            ({"state": torch.zeros(2, 2, 8, 8)}, r"state is \(2, 2, 8, 8\); it must be \(1, 2, 8, 8\)"),
            (
                {"state": torch.zeros(1, 2, 8, 8, dtype=torch.bfloat16)},
                r"state is torch.bfloat16; .*; pass state.float",
            ),
            ({"r": torch.zeros(1, 4, 16)}, r"r is \(1, 4, 16\); it must be \(B, T, H, N\)"),
            ({n: torch.zeros(1, 0, 2, 8) for n in ("r", "k", "v", "w_raw")}, r"r is \(1, 0, 2, 8\); .*T of 1 or more"),
        ],
    )
    @pytest.mark.parametrize("op", ["auto", "torch", "reference"])
    def test_refuses_what_does_not_fit(self, change, message, op):
        xs = dict(zip(self.inputs, self.draw(1, 4), strict=True)) | change
        with pytest.raises(ValueError, match=message):
            wkv6(**xs, op=op)
