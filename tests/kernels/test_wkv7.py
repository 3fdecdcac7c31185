import pytest
import torch
from recurrence import Contract, everywhere, run
from recurrence import draw_wkv7 as draw

from kernels import wkv7 as module
from kernels.wkv7 import wkv7, wkv7_reference
from kernels.wkv7_torch import CHUNK

# batch, steps, heads, head size: no chunk length divides most of them
SHAPES = [
    (2, 1, 4, 8), (2, 2, 2, 16), (1, 15, 2, 32), (2, 16, 1, 64), (1, 17, 3, 16), (3, 33, 2, 8), (1, 63, 1, 128),
    (2, 100, 2, 64), (1, 300, 2, 32), (2, 1, 3, 64), (2, 21, 3, 5), (1, 18, 1, 40), (1, 33, 1, 96), (1, 17, 1, 70),
    (1, 20, 1, 256), (1, 1000, 1, 64),
]  # fmt: skip


class TestWkv7(Contract):
    module = module
    op = staticmethod(wkv7)
    reference = staticmethod(wkv7_reference)
    inputs = ("r", "w_raw", "k", "v", "a", "b", "state")
    timed = inputs[:-1]

    @staticmethod
    def draw(batch, steps, *, device="cpu"):
        return draw(batch, steps, 2, 8, device=device)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @everywhere("shape", SHAPES, lambda s: s[0] * s[1] * s[2] <= 70 and s[3] <= 64)
    def test_matches_reference(self, where, shape, dtype):
        self.compare(draw(*shape, dtype, where.device), self.form(where), where=where)

    def test_the_compiled_form_takes_heads_of_one_channel(self):
        """The chunks do not: where the one direction is all but removed at each step, their products cancel."""
        xs = draw(4, 20, 8, 1)
        self.compare(xs, lambda *xs: wkv7(*xs, op="cpu"))

    @pytest.mark.parametrize("decay", ["any", "strongest", "none"])
    @everywhere("shape", [(2, 37, 2, 16), (1, 130, 1, 64)], lambda s: s[3] == 16)
    def test_matches_reference_under_strong_and_weak_decay(self, where, shape, decay):
        self.compare(draw(*shape, device=where.device, decay=decay), self.form(where))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @everywhere("shape", [(1, 40, 1, 16), (1, 130, 1, 64)], lambda s: s[3] == 16)
    def test_matches_reference_where_keys_are_alike(self, where, shape, dtype):
        """The system of equations that a chunk solves is then as badly conditioned as it gets."""
        self.compare(draw(*shape, dtype, where.device, alike=0.95), self.form(where), where=where)

    def test_the_decays_gradient_has_digits_where_the_sigmoid_is_flat(self, where):
        """Where torch's own sigmoid, and with it the reference, has none left: 1 - sigmoid(15) is 5 roundings of 1."""
        xs = draw(1, 40, 2, 8, device=where.device, decay="strongest")
        fast, exact = run(self.form(where), xs), run(wkv7_reference, [x.double() for x in xs], torch.float32)
        dw_raw, truth = (results[self.names.index("dw_raw")] for results in (fast, exact))
        assert (dw_raw - truth).norm() < 1e-5 * truth.norm()

    def test_reference_is_the_recurrence(self):
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

    def test_float64_gradients_match_finite_differences(self):
        xs = [x.requires_grad_() for x in draw(1, CHUNK + 3, 1, 2, torch.float64)]
        assert torch.autograd.gradcheck(lambda *xs: wkv7(*xs, op="torch"), xs)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"k": torch.zeros(1, 3, 2, 8)}, r"k is \(1, 3, 2, 8\) but r is \(1, 4, 2, 8\); all six share"),
            ({"b": torch.zeros(1, 4, 2, 9)}, r"b is \(1, 4, 2, 9\) but r is"),
            ({"state": torch.zeros(2, 8, 8)}, r"state is \(2, 8, 8\); it must be \(1, 2, 8, 8\)"),
            ({"state": torch.zeros(2, 2, 8, 8)}, r"state is \(2, 2, 8, 8\); it must be \(1, 2, 8, 8\)"),
            (
                {"state": torch.zeros(1, 2, 8, 8, dtype=torch.bfloat16)},
                r"state is torch.bfloat16; .*; pass state.float",
            ),
            ({"r": torch.zeros(1, 4, 16)}, r"r is \(1, 4, 16\); it must be \(B, T, H, N\)"),
            ({n: torch.zeros(1, 0, 2, 8) for n in timed}, r"r is \(1, 0, 2, 8\); .*T of 1 or more"),
        ],
    )
    @pytest.mark.parametrize("op", ["auto", "cpu", "torch", "reference"])
    def test_refuses_what_does_not_fit(self, change, message, op):
        xs = dict(zip(self.inputs, self.draw(1, 4), strict=True)) | change
        with pytest.raises(ValueError, match=message):
            wkv7(**xs, op=op)
