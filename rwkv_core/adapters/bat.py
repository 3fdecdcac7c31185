"""Bat: a small matrix for each stretch of `rank` inputs, which also turns the frozen matrix's own columns.

    W'[a, b] = W[a, b] + W[a, b] D[b] + D[b]        D (in / rank, rank, rank), 0 at first

where W[a, b] are the blocks of rank x rank of W. The sum over blocks is taken apart so that no W' is made, whose making costs
as much as a product of `out` rows: with z[b] = D[b] x[b],

    y = W (x + z) + repeated(sum_b z[b])

Source: Kang and Yin 2024, arXiv:2409.15371; names RWKV-PEFT (DiSHA, mode "bat"). Hugging Face's MiSS has a "bat" too, with
blocks that belong to the outputs: another method.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rwkv_core.adapters.bone import fold, unfold
from rwkv_core.adapters.linear import AdaptedLinear, apply, fitting, rows
from rwkv_core.quantize import Packed, product, product_back

if TYPE_CHECKING:
    from rwkv_core.config import BatConfig


class BatLinear(AdaptedLinear):
    """A linear layer with the small matrices beside it."""

    PARTS: ClassVar = ("disha",)

    def __init__(self, base: nn.Linear, config: "BatConfig", generator: torch.Generator) -> None:
        """See `AdaptedLinear`."""
        super().__init__(base, config, generator)
        for size in (base.in_features, base.out_features):
            if size % config.rank:
                raise ValueError(f"the rank must divide the {base.in_features} inputs and {base.out_features} outputs")
        self.disha = self.part(torch.zeros(base.in_features // config.rank, config.rank, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return apply(_Adapted, x, self.weight, self.disha)

    @staticmethod
    def merged(weight: Tensor, parts: Mapping[str, Tensor], config: "BatConfig") -> Tensor:
        """See `AdaptedLinear.merged`."""
        out, into = weight.shape
        rank = config.rank
        (d,) = fitting(parts, {"disha": (into // rank, rank, rank)})
        if out % rank or into % rank:
            raise ValueError(f"its rank is {rank}; it must divide the {into} inputs and {out} outputs")
        blocks = weight.reshape(out // rank, rank, into // rank, rank)  # a, row, b, column
        return (blocks + torch.einsum("aibj,bjk->aibk", blocks, d) + d.transpose(0, 1)).reshape(out, into)


class _Adapted(torch.autograd.Function):
    """y = (x + z) W' + repeated(fold(z)) in the dtype of x, z[b] = x[b] D[b]', with W frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Packed, d: Tensor) -> Tensor:
        z = _through(rows(x), d.to(x.dtype).mT)
        sums = fold(z, d.shape[-1])
        y = product(z.add_(rows(x)), weight)
        unfold(sums, y)
        ctx.save_for_backward(x, d)
        ctx.weight = weight
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, d = ctx.saved_tensors
        dy = rows(grads[0])
        dx = product_back(dy, ctx.weight)  # of x + z
        dz = dx.clone()
        unfold(fold(dy, d.shape[-1]), dz)
        dd = torch.bmm(_blocks(dz, d).mT, _blocks(rows(x), d)).to(d.dtype)
        if not ctx.needs_input_grad[0]:
            return None, None, dd
        return dx.add_(_through(dz, d.to(dy.dtype))).view(x.shape), None, dd


def _blocks(x: Tensor, d: Tensor) -> Tensor:
    """(M, in) -> (in / rank, M, rank), a view."""
    return x.view(len(x), -1, d.shape[-1]).transpose(0, 1)


def _through(x: Tensor, d: Tensor) -> Tensor:
    """Each stretch of x (M, in) times its d: (M, in), contiguous."""
    return torch.bmm(_blocks(x, d), d).transpose(0, 1).reshape(x.shape)
