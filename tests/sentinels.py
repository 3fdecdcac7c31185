"""What compiled code is given to fill lies between values that must stay as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

AROUND = 64
SENTINEL = 77.0


def guard(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """From now on `empty_like` and `new_empty` give NaN between sentinels.

    Returns:
        A function that checks the sentinels, and that no NaN is left, but where scratch may be; it says how many there were.
    """
    given = []

    def between(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        whole = torch.full((shape.numel() + 2 * AROUND,), SENTINEL, dtype=dtype)
        given.append(whole)
        inner = whole[AROUND:-AROUND]
        inner.fill_(torch.nan)
        return inner.view(shape)

    plain = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: int | tuple[int, ...], **kwargs: Any) -> Tensor:
        if kwargs:  # Triton's interpreter asks so
            return plain(self, *size, **kwargs)
        shape = size[0] if isinstance(size[0], tuple) else size
        return between(torch.Size(shape), self.dtype)

    monkeypatch.setattr(torch, "empty_like", lambda x: between(x.shape, x.dtype))
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

    def check(all_written: bool = True) -> int:
        for whole in given:
            assert (whole[:AROUND] == SENTINEL).all(), "written before the beginning"
            assert (whole[-AROUND:] == SENTINEL).all(), "written past the end"
            assert not (all_written and whole.isnan().any()), "not all written"
        return len(given)

    return check
