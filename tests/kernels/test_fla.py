import inspect
from functools import partial

import pytest
import torch
from recurrence import draw_wkv6, draw_wkv7, run

from kernels import wkv6, wkv7

pytest.importorskip("fla", reason="fla-core is optional")

NAMES = ("y", "final state", "gradient 1", "2", "3", "4", "5", "6", "7")


def test_wkv7_means_the_same(monkeypatch):
    """fla's kernels need a GPU, what it defines them by does not: the layouts at the border are tested by it."""
    from fla.ops import rwkv7
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    signature = inspect.signature(rwkv7.chunk_rwkv7)

    def chunk_rwkv7(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        assert given["scale"] == 1.0
        assert given["output_final_state"]
        r, w, k, v, a, b = (given[name].transpose(1, 2) for name in ("r", "w", "k", "v", "a", "b"))
        assert w.min() >= given["lower_bound"]
        y, final = dplr_recurrence(r * r.shape[-1] ** 0.5, k, v, a, b, w, given["initial_state"])
        return y.transpose(1, 2), final

    monkeypatch.setattr(rwkv7, "chunk_rwkv7", chunk_rwkv7)
    xs = draw_wkv7(2, 9, 3, 8)
    pairs = zip(NAMES, run(partial(wkv7.apply, "fla"), xs), run(wkv7.wkv7_reference, xs), strict=True)
    for name, got, want in pairs:
        torch.testing.assert_close(got, want, msg=name, atol=2e-5, rtol=2e-5)


def test_wkv6_means_the_same(monkeypatch):
    from fla.ops import rwkv6
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    signature = inspect.signature(rwkv6.chunk_rwkv6)

    def chunk_rwkv6(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        assert given["output_final_state"]
        r, k, v, w = (given[name].transpose(1, 2) for name in ("r", "k", "v", "w"))
        y, final = naive_recurrent_rwkv6(r, k, v, w, given["u"], given["scale"], given["initial_state"], True)
        return y.transpose(1, 2), final

    monkeypatch.setattr(rwkv6, "chunk_rwkv6", chunk_rwkv6)
    xs = draw_wkv6(2, 9, 3, 8)
    with torch.no_grad():  # fla's definition writes over what its gradient would need
        got, want = wkv6.apply("fla", *xs), wkv6.wkv6_reference(*xs)
    for name, x, y in zip(NAMES, got, want, strict=False):
        torch.testing.assert_close(x, y, msg=name, atol=2e-5, rtol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("operator", "draw"), [(wkv7, draw_wkv7), (wkv6, draw_wkv6)], ids=["wkv7", "wkv6"])
def test_on_a_gpu(operator, draw):
    """Its products are bfloat16's, so it is judged by what its authors say of them."""
    xs = draw(2, 130, 2, 64, torch.bfloat16, "cuda")
    reference = getattr(operator, f"{operator.__name__.split('.')[-1]}_reference")
    exact = run(reference, [x.double() for x in xs], torch.bfloat16)
    for name, got, want in zip(NAMES, run(partial(operator.apply, "fla"), xs), exact, strict=True):
        assert (got.double() - want).norm() <= 2e-2 * want.norm(), name
