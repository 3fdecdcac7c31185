"""Frozen matrices in 8 or 4 bits, and products with them.

int8, nf4, fp4: each stretch of values is divided by its largest magnitude, and of each value the number of the nearest of 256
or 16 levels is kept. fp8: each row is divided by what makes its largest magnitude that of float8_e4m3fn, and rounded to that.
"-double": the magnitudes, less their mean, are kept as int8 too.

Storage is that of bitsandbytes (fp8 apart, which it has not), whose compiled code unpacks where it runs; elsewhere torch does,
to the same bits. A product unpacks a few million values at a time, in the forward and again in the backward.
Source: Dettmers 2015, arXiv:1511.04561 (int8's levels); Dettmers et al. 2023, "QLoRA", arXiv:2305.14314 (nf4, double).
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import products

Form = Literal["none", "int8", "int8-double", "nf4", "nf4-double", "fp4", "fp4-double", "fp8"]
"""How a matrix is kept; none: as it is."""

BLOCKS = {"int8": 256, "nf4": 64, "fp4": 64}
"""Values that share a magnitude."""

_TILE = 1 << 24
"""Values that are unpacked at a time, at most; but whole rows, and so many that no stretch is cut."""

_BITS = 1 << 16
"""Cells of float32: those that begin with the same 16 bits."""


class Packed(nn.Module):
    """A matrix in few bits. As the module `weight` of a linear layer it is in the layer's state_dict."""

    def __init__(self, weight: Tensor, form: Form, device: torch.device | str | None = None) -> None:
        """Pack a matrix.

        Args:
            weight: (out, in), of any float dtype, on any device.
            form: of storage, not "none".
            device: to work on and to be on; None is the weight's.
        """
        super().__init__()
        self.form, self.shape = form, weight.shape
        self._kind = form.removesuffix("-double")
        pieces = []
        for rows in _tiles(self.shape, self._kind):
            piece = weight.detach()[rows].to(device or weight.device, torch.float32)
            pieces.append(_pack_rows(piece) if form == "fp8" else _pack(piece.flatten(), self._kind))
        codes, magnitudes = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        self.codes = nn.Parameter(codes, requires_grad=False)
        """uint8, a stretch after the other, the earlier of two 4-bit numbers in a byte's upper half; or float8 (out, in)."""
        if form.endswith("-double"):
            offset = magnitudes.mean()
            magnitudes, scale = _pack(magnitudes - offset, "int8")
            self.register_buffer("offset", offset)
            self.register_buffer("scale", scale)
        self.register_buffer("magnitudes", magnitudes)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """What its values are exact in."""
        return torch.float32

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(x.nbytes for x in self.state_dict().values())

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their values in `dtype`, from the first to the last."""
        magnitudes = self._magnitudes()
        columns = self.shape[1]
        for rows in _tiles(self.shape, self._kind):
            shape = rows.stop - rows.start, columns
            if self.form == "fp8":
                yield rows, self.codes[rows].to(torch.float32).mul_(magnitudes[rows, None]).to(dtype)
                continue
            block = BLOCKS[self._kind]
            first, last = (-(-row * columns // block) for row in (rows.start, rows.stop))
            bytes_of_block = len(self.codes) // len(magnitudes)
            codes = self.codes[first * bytes_of_block : last * bytes_of_block]
            yield rows, _unpack(codes, magnitudes[first:last], self._kind, shape, dtype)

    def unpacked(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix."""
        return torch.cat([tile for _, tile in self.tiles(dtype)])

    def _magnitudes(self) -> Tensor:
        held: Any = self.magnitudes
        if not self.form.endswith("-double"):
            return held  # type: ignore[no-any-return]
        count = -(-math.prod(self.shape) // BLOCKS[self._kind])
        scale: Any = self.scale
        return _unpack(held, scale, "int8", (1, count), torch.float32)[0] + self.offset  # type: ignore[operator]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        """As of any module, but what is packed keeps its dtypes when a model is brought to another one."""

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype == x.dtype else x.to(y.device)

        return super()._apply(moved, recurse)  # type: ignore[no-any-return, no-untyped-call]


class QuantizedLinear(nn.Linear):
    """y = x W', with W packed and frozen."""

    def __init__(self, packed: Packed) -> None:
        """Around a matrix (out, in)."""
        super().__init__(packed.shape[1], packed.shape[0], bias=False, device="meta")
        hold(self, packed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return frozen_product(x, self.weight)


def hold(layer: nn.Linear, weight: Tensor | Packed) -> None:
    """Make it the layer's matrix, frozen."""
    del layer.weight  # a module can't take a parameter's name
    layer.weight = weight.requires_grad_(False)  # type: ignore[assignment]


def frozen_product(x: Tensor, weight: Tensor | Packed) -> Tensor:
    """The product x W' in the dtype of x, with a gradient to x alone: (..., in) -> (..., out)."""
    y: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Packed) -> Tensor:
        ctx.weight, ctx.shape = weight, x.shape
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        dy = grads[0]
        return product_back(dy.reshape(-1, dy.shape[-1]), ctx.weight).view(ctx.shape), None


def product(x: Tensor, weight: Tensor | Packed) -> Tensor:
    """The product x W' in the dtype of x, without a gradient of its own: (..., in) -> (..., out)."""
    if isinstance(weight, Tensor):
        return products.linear(x, weight.to(x.dtype))
    return torch.cat([products.linear(x, tile) for _, tile in weight.tiles(x.dtype)], -1)


def product_back(dy: Tensor, weight: Tensor | Packed) -> Tensor:
    """The product dy W in the dtype of dy, without a gradient of its own: (M, out) -> (M, in)."""
    if isinstance(weight, Tensor):
        return products.product(dy, weight.to(dy.dtype))
    dx = dy.new_empty(len(dy), weight.shape[1])
    for rows, tile in weight.tiles(dy.dtype):
        products.put(dx, dy[:, rows], tile, beta=1 if rows.start else 0)
    return dx


def rounded(weight: Tensor, form: Form) -> Tensor:
    """The matrix as it is once packed, float32."""
    return Packed(weight, form).unpacked()


def _tiles(shape: torch.Size, kind: str) -> Iterator[slice]:
    """Stretches of rows of at most _TILE values, or as few rows as end with a block."""
    rows, columns = shape
    step = BLOCKS.get(kind, 1)
    step //= math.gcd(step, columns)
    step *= max(1, _TILE // (step * columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _pack_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) float32 -> float8 of that shape, and what each row was divided by."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    magnitudes = values.abs().amax(1) / largest
    scaled = (values / _not_zero(magnitudes)[:, None]).clamp_(-largest, largest)  # beyond it there is no value but NaN
    return scaled.to(torch.float8_e4m3fn), magnitudes


def _pack(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(n,) float32 -> (bytes,) uint8, and the magnitude of each stretch. The last stretch is filled up with zeros."""
    block = BLOCKS[kind]
    blocks = F.pad(values, (0, -len(values) % block)).view(-1, block)
    magnitudes = blocks.abs().amax(1)
    numbers = _nearest(blocks / _not_zero(magnitudes)[:, None], kind).flatten()
    if kind != "int8":
        numbers = numbers[::2] << 4 | numbers[1::2]
    return numbers, magnitudes


def _not_zero(magnitudes: Tensor) -> Tensor:
    return magnitudes.clamp(min=torch.finfo(torch.float32).tiny)


def _nearest(x: Tensor, kind: str) -> Tensor:
    """The numbers of the levels that values from -1 to 1 are nearest to, uint8.

    Values whose first 16 bits are equal lie between two borders of levels, or on both sides of one; that is looked up, and
    one comparison decides: a search among 255 borders takes six times as long.
    """
    first, border, order = _cells(kind, x.device)
    cell = (x.view(torch.int32) >> 16) & (_BITS - 1)
    place = F.embedding(cell, first)[..., 0] + (x > F.embedding(cell, border)[..., 0])
    return place if order is None else order[place.int()]


@functools.cache
def _cells(kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each cell of float32, its place among the sorted levels and the border that may lie in it; and the levels' numbers.

    Those are None where the levels are sorted by their numbers.
    """
    levels, order = _levels(kind, torch.device("cpu")).sort(stable=True)
    borders = (levels[:-1] + levels[1:]) / 2
    begin = torch.arange(_BITS, dtype=torch.int64) << 16
    ends = [torch.bucketize(_float(begin + last), borders) for last in (0, _BITS - 1)]
    first = torch.minimum(*ends)
    border = torch.cat([borders, torch.tensor([math.inf])])[first]
    in_order = bool((order[1:] > order[:-1]).all())
    return (
        first.to(device, torch.uint8)[:, None],
        border.to(device)[:, None],
        None if in_order else order.to(device, torch.uint8),
    )


def _float(bits: Tensor) -> Tensor:
    """The float32 values of unsigned 32-bit patterns."""
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).to(torch.int32).view(torch.float32)


@functools.cache
def _levels(kind: str, device: torch.device) -> Tensor:
    """The levels by number, from -1 to 1, float32."""
    match kind:
        case "nf4":  # quantiles of the normal distribution; QLoRA, appendix E
            values = [
                -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
            ]  # fmt: skip
        case "fp4":  # sign, two bits of exponent, one of fraction
            half = [x / 12 for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
            values = half + [-x for x in half]
        case _:  # a fraction that has the more bits the larger the decade: 2^i levels in the i-th of seven
            values = [0.0, 1.0]
            for i in range(7):
                ends = torch.linspace(0.1, 1, 2**i + 1)
                decade = ((ends[:-1] + ends[1:]) / 2 * 10.0 ** (i - 6)).tolist()
                values += [*decade, *(-x for x in decade)]
            values.sort()
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """The two levels that each byte stands for: (256, 2)."""
    levels = _levels(kind, device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)


def _unpack(codes: Tensor, magnitudes: Tensor, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Whole stretches to values of `shape`."""
    device = codes.device
    if _has_bitsandbytes(device.type):
        ops = torch.ops.bitsandbytes
        block, known = BLOCKS[kind], dtype if dtype.itemsize < 8 else torch.float32
        if kind == "int8":
            y: Tensor = ops.dequantize_blockwise.default(codes, magnitudes, _levels(kind, device), block, known)
        else:  # as one row: on a CPU it would take the stretches of a narrow matrix for its rows
            y = ops.dequantize_4bit.default(
                codes[:, None], magnitudes, block, kind, (1, len(magnitudes) * block), known
            )
    else:
        table = _levels(kind, device)[:, None] if kind == "int8" else _pairs(kind, device)
        y = F.embedding(codes.int(), table).view(len(magnitudes), -1).mul_(magnitudes[:, None])
    return y.reshape(-1)[: math.prod(shape)].view(shape).to(dtype)


@functools.cache
def _has_bitsandbytes(device: str) -> bool:
    """Whether it unpacks there with compiled code."""
    try:
        with quiet_bitsandbytes():
            from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except Exception:  # it is not there, or does not fit this torch
        return False
    return device in ("cpu", "cuda") and not isinstance(lib, ErrorHandlerMockBNBNativeLibrary)


@contextlib.contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Within, it may be imported: it takes our package `kernels` for Hugging Face's, and would tell that it is not that."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
