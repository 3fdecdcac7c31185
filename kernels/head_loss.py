"""The head and its cross-entropy in one: a vocabulary of 65536 never stands in memory for all positions at once.

    z = h W'      nll = logsumexp(z) - z[target]      dz = softmax(z) - onehot(target)

Rows are done a block at a time, and the gradients of h and W are formed while a block's logits are at hand, so the
backward only scales them. W's gradient is formed only if W is trained.

L2Wrap is RWKV's regulariser: it adds l2_wrap * max(z) to dz at the largest logit, and nothing to the loss. Here it takes
part in the scaling of the loss, and skips positions that have no target.
Shapes: R rows (positions), C channels, V vocabulary. Source: Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989;
L2Wrap: BlinkDL/RWKV-LM.
"""

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that is not learned."""

ROWS = 64
"""Rows a block: 16 MB of float32 logits at V = 65536. 64 and 128 were the fastest of 16 to 1024 on a 2-core CPU."""


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, l2_wrap: float = 0.0) -> Tensor:
    """Sum of the cross-entropies of all positions that have a target.

    Args:
        hidden: (R, C), what the head reads.
        weight: (V, C), the head's matrix.
        targets: (R,) int64 in [0, V), or IGNORE.
        l2_wrap: strength of L2Wrap; 0 is none.

    Returns:
        The sum in nats, a float32 scalar; 0 where no position has a target. Divide by the number of targets for a mean.

    Raises:
        ValueError: the shapes disagree.
    """
    _check(hidden, weight, targets)
    result: Tensor = _HeadLoss.apply(hidden, weight, targets, l2_wrap)  # type: ignore[no-untyped-call]
    return result


def head_loss_reference(hidden: Tensor, weight: Tensor, targets: Tensor, l2_wrap: float = 0.0) -> Tensor:
    """The same by plain torch operations, with L2Wrap as a term whose value is 0 and whose gradient is the pull."""
    logits = hidden @ weight.mT
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    largest = logits.amax(-1)
    pull = 0.5 * l2_wrap * (largest**2)[targets != IGNORE].sum()
    return loss + pull - pull.detach()


@torch.no_grad()
def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each position in nats, (R,) float32; 0 where the target is IGNORE. Shapes as in `head_loss`."""
    _check(hidden, weight, targets)
    blocks = [
        torch.nn.functional.cross_entropy(
            (hidden[i : i + ROWS] @ weight.mT).float(), targets[i : i + ROWS], ignore_index=IGNORE, reduction="none"
        )
        for i in range(0, len(targets), ROWS)
    ]
    return torch.cat(blocks) if blocks else hidden.new_zeros(0, dtype=torch.float32)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    rows, channels = hidden.shape
    if weight.shape[1:] != (channels,) or targets.shape != (rows,):
        raise ValueError(
            f"weight is {tuple(weight.shape)} and targets {tuple(targets.shape)} for hidden {tuple(hidden.shape)}; "
            f"they must be (V, {channels}) and ({rows},); flatten batch and time into rows"
        )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, l2_wrap: float) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        dhidden = torch.zeros_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        learned = targets != IGNORE
        for i in range(0, len(targets), ROWS):
            block = slice(i, i + ROWS)
            h, mask = hidden[block], learned[block]
            target = targets[block].masked_fill(~mask, 0)[:, None]
            z = (h @ weight.mT).float()
            log_p = torch.log_softmax(z, 1)
            total -= log_p.gather(1, target)[mask].double().sum()
            if not (wants_hidden or wants_weight):
                continue
            dz = log_p.exp_()  # in place: these are the largest tensors of a training step
            dz.scatter_add_(1, target, dz.new_full(target.shape, -1))
            if l2_wrap:
                largest, where = z.max(1, keepdim=True)
                dz.scatter_add_(1, where, l2_wrap * largest)
            if not mask.all():
                dz.mul_(mask[:, None])
            dz = dz.to(weight.dtype)
            if dhidden is not None:
                dhidden[block] = dz @ weight
            if dweight is not None:
                dweight.addmm_(dz.mT.float(), h.float())
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        dhidden, dweight = ctx.saved_tensors
        (scale,) = grads
        return (
            None if dhidden is None else dhidden * scale,
            None if dweight is None else (dweight * scale).to(ctx.weight_dtype),
            None,
            None,
        )
