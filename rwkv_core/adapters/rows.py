"""Some rows of the embedding or the head, trained as they are: those of new tokens.

The rows alone stand beside the frozen matrix, in full precision: what an optimizer keeps of them is as small as they are. The
matrix has them in it too, rounded to its own precision, so all that reads it goes on as before.
Shapes: V vocabulary, C channels, N rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import products
from rwkv_core.adapters.linear import apply, rows, wide
from rwkv_core.quantize import product, product_back

PARTS = ("rows", "values")
"""What files have after the module's name: (N,) int64, ascending, and (N, C)."""


class Rows(nn.Module):
    """A frozen matrix (V, C), of which some rows are trained."""

    KEPT: ClassVar = ("rows",)
    """What is not trained, and that a merge needs too."""

    weight: Tensor
    rows: Tensor

    def stand_in(self, base: nn.Embedding | nn.Linear, chosen: Sequence[int]) -> None:
        """Take the place of `base`, without having an effect yet; `chosen` ascend."""
        self.weight = base.weight.requires_grad_(False)
        self.register_buffer("rows", torch.tensor(chosen, device=self.weight.device))
        self.values = nn.Parameter(self.weight.detach()[self.rows].to(wide(self.weight)))

    def now(self) -> Tensor:
        """The matrix as it is now."""
        self.weight.data.index_copy_(0, self.rows, self.values.detach().to(self.weight.dtype))
        return self.weight


class RowsEmbedding(Rows, nn.Embedding):
    """An embedding of which some rows are trained."""

    def __init__(self, base: nn.Embedding, chosen: Sequence[int]) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, device="meta")
        self.stand_in(base, chosen)

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) -> (..., C)."""
        y: Tensor = _Embedded.apply(tokens, self.values, self.now(), self.rows)  # type: ignore[no-untyped-call]
        return y


class RowsLinear(Rows, nn.Linear):
    """A head of which some rows are trained."""

    def __init__(self, base: nn.Linear, chosen: Sequence[int]) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.stand_in(base, chosen)
        self._base = (base,)  # not as a module of this one: it has the same weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        weight = self.now()
        if torch.is_grad_enabled():
            return apply(_Product, x, self.values, weight, self.rows)
        y: Tensor = self._base[0](x)
        return y

    def trained_rows(self) -> tuple[Tensor, Tensor]:
        """Which, and what gets their gradient, for who multiplies by `now()` himself."""
        return self.rows, self.values


class _Embedded(torch.autograd.Function):
    """The rows of the weight that the tokens name."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, values: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, values, chosen)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        tokens, values, chosen = ctx.saved_tensors
        at = torch.searchsorted(chosen, tokens.contiguous()).clamp_(max=len(chosen) - 1)
        hit = chosen[at] == tokens
        return None, torch.zeros_like(values).index_add_(0, at[hit], grads[0][hit].to(values.dtype)), None, None


class _Product(torch.autograd.Function):
    """x W'. The weight is not saved: before the backward it may be written again, with the same values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, chosen)
        ctx.weight = weight
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, values, chosen = ctx.saved_tensors
        dx = product_back(grads[0], ctx.weight) if ctx.needs_input_grad[0] else None
        return dx, products.product(rows(grads[0])[:, chosen].mT, rows(x)).to(values.dtype), None, None


def stand_in(base: nn.Module, chosen: Sequence[int]) -> Rows:
    """What takes the place of an embedding or a head."""
    if isinstance(base, nn.Embedding):
        return RowsEmbedding(base, chosen)
    if isinstance(base, nn.Linear):
        return RowsLinear(base, chosen)
    raise TypeError(f"{type(base).__name__} has no rows of tokens; give an embedding or a head")


def placed(weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """A copy of `weight` with the rows of a file in it, which must fit, in the precision that sums are made in."""
    values = parts["values"].to(weight.device, wide(weight))
    return weight.to(wide(weight)).index_copy(0, parts["rows"].to(weight.device), values)


def check(shape: Sequence[int], parts: Mapping[str, Tensor], wanted: Sequence[int] | None = None) -> None:
    """That the rows of a file fit a matrix of that shape, and are those `wanted`, where that is known.

    Raises:
        ValueError: they do not.
    """
    found = {name: (tuple(x.shape), x.dtype) for name, x in parts.items()}
    if found.keys() != set(PARTS):
        raise ValueError(f"has {', '.join(found) or 'nothing'}; it must be {' and '.join(PARTS)}")
    chosen, values = parts["rows"], parts["values"]
    count, width = shape
    if chosen.ndim != 1 or chosen.dtype != torch.int64 or values.shape != (len(chosen), width):
        raise ValueError(f"has {found}; it must be numbers of rows, and as many rows of {width}")
    if len(chosen) and not (int(chosen[0]) >= 0 and int(chosen[-1]) < count and bool((chosen.diff() > 0).all())):
        raise ValueError(f"the numbers of its rows must ascend within [0, {count})")
    if wanted is not None and chosen.tolist() != list(wanted):
        raise ValueError("its rows are others than its settings say")


def without_unchanged(
    trained: Mapping[str, Tensor], base: Callable[[], Mapping[str, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Of an embedding or a head that was trained whole, the rows that changed alone, where most did not.

    Args:
        trained: what is to be saved.
        base: gives the tensors of the checkpoint that was trained on.
        dtype: what the model was loaded in.
    """
    kept: dict[str, Tensor] = {}
    for name, x in trained.items():
        module, _, part = name.rpartition(".")
        chosen = None
        if part == "weight" and module in ("emb", "head"):
            chosen = (x.cpu() != base()[name].to(dtype).to(x.dtype)).any(1).nonzero().squeeze(1)
        if chosen is None or 2 * len(chosen) > len(x):
            kept[name] = x
        else:
            kept |= {f"{module}.rows": chosen, f"{module}.values": x.cpu()[chosen]}
    return kept
