"""The pass of `kernels.head_loss` over a block of logits, in Triton: a program for each row."""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
"""Logits that a program holds at a time."""


def fused(z: Tensor, targets: Tensor, counts: Tensor | None, l2_wrap: float, nll: Tensor, wants: bool) -> None:
    """See `kernels.head_loss`."""
    rows, vocab = z.shape
    block = min(BLOCK, triton.next_power_of_2(vocab))
    _rows[(rows,)](z, targets, counts, nll, vocab, l2_wrap, wants, block, num_warps=16)


@triton.jit
def _rows(Z, TARGETS, COUNTS, NLL, vocab, l2_wrap, WANTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    z_row = Z + row.to(tl.int64) * vocab
    lanes = tl.arange(0, BLOCK)
    target = tl.load(TARGETS + row)
    aim = tl.load(z_row + target).to(tl.float32)  # now: below, another warp may already have put the gradient there

    # The largest logit, the first place that has it, and the sum of e^(z - largest), in one pass: where a block brings a larger
    # one, the sum so far shrinks.
    largest = -float("inf")
    where = 0
    total = 0.0
    for start in range(0, vocab, BLOCK):
        at = start + lanes
        z = tl.load(z_row + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
        here = tl.max(z, 0)
        first = tl.min(tl.where(z == here, at, vocab), 0)
        where = tl.where(here > largest, first, where)
        both = tl.maximum(here, largest)
        total = total * tl.exp(largest - both) + tl.sum(tl.exp(z - both), 0)
        largest = both
    tl.store(NLL + row, tl.log(total) - (aim - largest))

    if WANTS:
        count = 1.0
        if COUNTS is not None:
            count = tl.load(COUNTS + row)
        scale = count / total
        pull = count * l2_wrap * largest
        for start in range(0, vocab, BLOCK):
            at = start + lanes
            z = tl.load(z_row + at, mask=at < vocab, other=0.0).to(tl.float32)
            dz = tl.exp(z - largest) * scale
            dz = tl.where(at == target, dz - count, dz)
            dz = tl.where(at == where, dz + pull, dz)
            tl.store(z_row + at, dz.to(Z.dtype.element_ty), mask=at < vocab)
