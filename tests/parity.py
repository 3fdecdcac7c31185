"""The tolerance rule: an implementation may be no worse than twice the reference in the same precision."""

import torch
from torch import Tensor


def assert_parity(name: str, fast: Tensor, slow: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Assert that `fast` is as close to `exact` as `slow` is, up to `factor`, in the root of the mean square.

    The largest error of a tensor is one draw from the tail of its errors: it differs two- and threefold between two
    implementations that are equally good, and between machines. Their mean square averages over all elements, so a factor of
    2 holds with room to spare where nothing is wrong, and is exceeded where something is.

    Args:
        name: what is compared, for the message.
        fast: the implementation's result.
        slow: the reference's result on the same inputs in the same precision.
        exact: the reference's result in float64.
        factor: how many times worse than the reference the implementation may be.

    Source:
        After the rule of Dao-AILab/flash-attention, tests/test_flash_attn.py, which judges the largest error.
    """
    assert fast.shape == exact.shape, f"{name}: {tuple(fast.shape)} instead of {tuple(exact.shape)}"
    assert not fast.isnan().any(), f"{name}: NaN"
    floor = torch.finfo(fast.dtype).eps * _rms(exact)
    allowed = factor * (_rms(slow.double() - exact) + floor)
    error = _rms(fast.double() - exact)
    assert error <= allowed, f"{name}: error {error:.2e} exceeds {factor} x the reference's own {allowed / factor:.2e}"


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
