"""The head and its cross-entropy in one: a vocabulary of 65536 never stands in memory for all positions at once.

    z = h W'      nll = logsumexp(z) - z[target]      loss = sum_t weight_t nll_t
    dz_t = weight_t (softmax(z_t) - onehot(target_t) + l2_wrap max(z_t) onehot(argmax(z_t)))
    dh = dz W     dW = dz' h

Rows are done a block at a time: a product gives the block's logits, one pass over them leaves nll and, in their place, dz,
and more products make of it dh and, if W is trained, dW. So the gradients are there when the loss is, and the backward only
scales them. Positions that are not learned are left out at the start, and cost nothing.

L2Wrap is RWKV's regulariser: it pulls the largest logit, the first of equals, towards 0, and adds nothing to the loss. Here it
takes part in the scaling of the loss, and in the weights of tokens.
Shapes: R rows (positions), C channels, V vocabulary. Source: Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989;
L2Wrap: BlinkDL/RWKV-LM.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels import build
from kernels.choice import Form, Op, choose
from kernels.linear import slow_in
from kernels.operator import operator
from kernels.products import product, put

IGNORE = -100
"""Target of a position that is not learned."""

FORMS: tuple[Form, ...] = ("cpu", "triton", "torch")
"""Of the pass over a block's logits, fastest first. The products are the library's in all of them."""

LOGITS = 1 << 26
"""Bytes of a block's logits: 256 rows of float32 at V = 65536. On a 2-core CPU, 512 rows at C = 768 took 1.53 times as long as
the bare products of all rows at once with 16 MB, 1.21 with 32, 1.20 with 64, 1.15 with 128."""

CONVERTED = 1 << 22
"""Weights that stand in another dtype at a time, where the products need one that is not theirs: 16 MB."""


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2_wrap: float = 0.0,
    *,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    values: Tensor | None = None,
    op: Op = "auto",
) -> Tensor:
    """Weighted sum of the cross-entropies of all positions that have a target.

    Args:
        hidden: (R, C), what the head reads. The products are in its dtype, or autocast's, or float32 where that is faster.
        weight: (V, C), the head's matrix; it may be of another dtype.
        targets: (R,) int64 in [0, V), or IGNORE.
        l2_wrap: strength of L2Wrap; 0 is none.
        token_weight: (R,), 0 or more: what each position's loss and L2Wrap count; 0 is as IGNORE. It is data, and gets no
            gradient. None is 1 for all.
        rows: (N,) int64, where only some rows of `weight` are trained: which, each once. `weight` itself is then frozen.
        values: (N, C), what gets their gradient. `weight` must have it in these rows already.
        op: the implementation; "auto" takes the fastest that works, see `kernels.choice`.

    Returns:
        The sum in nats, a float32 scalar (float64 if hidden is); 0 where no position is learned. Divide by the number of
        targets for a mean.

    Raises:
        ValueError: the shapes disagree; a target or a weight is out of its range; `token_weight` requires gradients, or
            `weight` does beside `values`; or `op` can't work on these.
        RuntimeError: `op` could not be compiled, or its library is missing.
    """
    _check(hidden, weight, targets, token_weight)
    _check_rows(weight, rows, values)
    hidden = _mixed(hidden)
    form = choose("head_loss", op, FORMS, hidden)
    return apply(form, hidden, weight, targets, l2_wrap, token_weight, rows, values)


def head_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2_wrap: float = 0.0,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """The same by plain torch operations, with L2Wrap as a term whose value is 0 and whose gradient is the pull.

    Where the largest logit is there twice, its pull is shared between the two.
    """
    if rows is not None and values is not None:
        weight = weight.index_copy(0, rows, values.to(weight.dtype))
    logits = hidden @ weight.to(hidden.dtype).mT
    logits = logits.to(_wide(logits))
    nll = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    pull = 0.5 * l2_wrap * logits.amax(-1) ** 2
    terms = nll + pull - pull.detach()
    learned = targets != IGNORE
    if token_weight is not None:
        learned = learned & (token_weight > 0)
        terms = terms * token_weight
    return terms[learned].sum()


@torch.no_grad()
def token_nll(hidden: Tensor, weight: Tensor, targets: Tensor, *, op: Op = "auto") -> Tensor:
    """Cross-entropy of each position in nats, (R,) float32; 0 where the target is IGNORE. As `head_loss` otherwise."""
    _check(hidden, weight, targets, None)
    hidden = _mixed(hidden)
    form = choose("head_loss", op, FORMS, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if form == "reference":
            logits = hidden @ weight.to(hidden.dtype).mT
            return torch.nn.functional.cross_entropy(
                logits.to(_wide(logits)), targets, ignore_index=IGNORE, reduction="none"
            )
        nll: Tensor = _forward(hidden, weight, targets, None, 0.0, form, False, False, None, None)[1]
        return nll


def apply(
    form: Form,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    l2_wrap: float = 0.0,
    token_weight: Tensor | None = None,
    rows: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """The operator by the form of that name, which must be able to work on these: `head_loss` has chosen and checked."""
    with torch.autocast(hidden.device.type, enabled=False):  # `head_loss` has asked it for the products' dtype
        if form == "reference":
            return head_loss_reference(hidden, weight, targets, l2_wrap, token_weight, rows, values)
        trained = weight if values is None else values
        wants = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, trained))
        loss: Tensor = _forward(hidden, weight, targets, token_weight, l2_wrap, form, *wants, rows, values)[0]
        return loss


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor | None) -> None:
    rows, channels = hidden.shape
    if weight.ndim != 2 or weight.shape[1] != channels or targets.shape != (rows,):
        raise ValueError(
            f"weight is {tuple(weight.shape)} and targets {tuple(targets.shape)} for hidden {tuple(hidden.shape)}; "
            f"they must be (V, {channels}) and ({rows},); flatten batch and time into rows"
        )
    if token_weight is not None and (token_weight.shape != (rows,) or token_weight.requires_grad):
        raise ValueError(
            f"token_weight is {tuple(token_weight.shape)}, requires_grad={token_weight.requires_grad}; it must be ({rows},) "
            "and data: no gradient reaches it; flatten and detach it"
        )


def _check_rows(weight: Tensor, rows: Tensor | None, values: Tensor | None) -> None:
    if rows is None and values is None:
        return
    shapes = [None if x is None else tuple(x.shape) for x in (rows, values)]
    if rows is None or rows.ndim != 1 or shapes[1] != (len(rows), weight.shape[1]) or weight.requires_grad:
        raise ValueError(
            f"rows is {shapes[0]}, values {shapes[1]}, weight {tuple(weight.shape)} with requires_grad={weight.requires_grad}; "
            f"they must be (N,), (N, {weight.shape[1]}) and frozen; train either the weight or some of its rows"
        )


def _mixed(hidden: Tensor) -> Tensor:
    """As mixed precision would have it read."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@operator("rwkv::head_loss")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    l2_wrap: float,
    form: str,
    wants_hidden: bool,
    wants_weight: bool,
    rows: Tensor | None,
    values: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss; nll, (R,), not weighted; and the gradients of hidden, and weight or values, where wanted, else nothing."""
    nll = hidden.new_zeros(len(hidden), dtype=_wide(hidden))
    dhidden = hidden.new_zeros(hidden.shape if wants_hidden else 0)
    trained = weight if values is None else values
    dweight = trained.new_zeros(trained.shape if wants_weight else 0, dtype=_wide(trained))
    counts = None if token_weight is None else token_weight.to(nll.dtype)
    learned = _learned(targets, counts, len(weight))
    dtype = torch.float32 if slow_in(hidden) else hidden.dtype
    block = _rows(len(learned), len(weight) * dtype.itemsize)
    logits = _scratch(block, len(weight), dtype, hidden.device, form)
    for start in range(0, len(learned), block):
        at = slice(start, start + block) if len(learned) == len(targets) else learned[start : start + block]
        h = hidden[at].to(dtype)
        z, found = logits[: len(h)], nll.new_empty(len(h))
        for part, w in _parts(weight, dtype):
            put(z[:, part], h, w.mT)
        aims, each = targets[at].contiguous(), None if counts is None else counts[at].contiguous()
        _fused(form)(z, aims, each, l2_wrap, found, wants_hidden or wants_weight)
        nll[at] = found
        if wants_hidden:
            dh = nll.new_zeros(h.shape)  # float32: in bfloat16 the parts' sum would lose what each of them keeps
            for part, w in _parts(weight, dtype):
                dh += product(z[:, part], w)
            dhidden[at] = dh.to(hidden.dtype)
        if wants_weight and rows is not None:
            dweight += product(z[:, rows].mT, h)
        elif wants_weight:
            for part in _slices(weight):
                dw, dz = dweight[part], z[:, part].mT
                put(dw, dz, h, beta=1) if dw.dtype is dtype else dw.add_(dz @ h)
    loss = (nll.double() if counts is None else nll.double() * counts).sum().to(nll.dtype)
    return loss, nll, dhidden, dweight


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor | None,
    l2_wrap: float,
    form: str,
    wants_hidden: bool,
    wants_weight: bool,
    rows: Tensor | None,
    values: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nll = hidden.new_empty(len(hidden), dtype=_wide(hidden))
    dhidden = hidden.new_empty(hidden.shape if wants_hidden else 0)
    trained = weight if values is None else values
    dweight = trained.new_empty(trained.shape if wants_weight else 0, dtype=_wide(trained))
    return nll.new_empty(()), nll, dhidden, dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # nobody has one for the other outputs: these would be zeros of their sizes
    ctx.save_for_backward(*output[2:])
    ctx.weight_dtype = (inputs[1] if inputs[-1] is None else inputs[-1]).dtype


def _grad(ctx: Any, scale: Tensor | None, *_of_others: None) -> tuple[Tensor | None, ...]:
    if scale is None:
        return (None,) * 10
    dhidden, dweight = ctx.saved_tensors
    wants_hidden, wants_weight, wants_values = (ctx.needs_input_grad[i] for i in (0, 1, -1))
    dtrained = (dweight * scale).to(ctx.weight_dtype) if wants_weight or wants_values else None
    return (
        dhidden * scale.to(dhidden.dtype) if wants_hidden else None,
        dtrained if wants_weight else None,
        *[None] * 7,
        dtrained if wants_values else None,
    )


_forward.register_autograd(_grad, setup_context=_save)


def _learned(targets: Tensor, counts: Tensor | None, vocab: int) -> Tensor:
    """Which rows count.

    Raises:
        ValueError: a target or a weight is out of its range.
    """
    learned = targets != IGNORE
    outside = learned & ((targets < 0) | (targets >= vocab))
    if outside.any():
        raise ValueError(f"a target is {targets[outside][0]}; it must be in [0, {vocab}), or {IGNORE} to ignore it")
    if counts is not None:
        if not (counts >= 0).all():
            raise ValueError(f"a token_weight is {counts[~(counts >= 0)][0]}; it must be 0 or more")
        learned &= counts > 0
    return learned.nonzero().squeeze(1)


def _rows(learned: int, size: int) -> int:
    """Rows a block, of `size` bytes each: as many as LOGITS allows, in blocks of about one size."""
    blocks = -(-learned // max(LOGITS // size, 1))
    return -(-learned // max(blocks, 1)) or 1


def scratch(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    """What the operator takes beside its results where all positions are learned, in bytes.

    Args:
        hidden: (R, C), see `head_loss`; that these are there is not needed, only of what kind they are.
        weight: (V, C).

    Returns:
        The logits of a block, which a CPU's thread keeps; and what is there for a block at a time.
    """
    dtype = torch.float32 if slow_in(hidden) else hidden.dtype
    rows = _rows(len(hidden), len(weight) * dtype.itemsize)
    inputs = 0 if dtype is hidden.dtype else rows * hidden.shape[1] * dtype.itemsize
    converted = 0 if weight.dtype is dtype else min(CONVERTED, weight.numel()) * dtype.itemsize
    gradients = rows * hidden.shape[1] * (_wide(hidden).itemsize + dtype.itemsize)
    return rows * len(weight) * dtype.itemsize, inputs + converted + gradients


def _scratch(rows: int, vocab: int, dtype: torch.dtype, device: torch.device, form: str) -> Tensor:
    """Memory for a block's logits, (rows, V), not initialised.

    On a CPU each thread keeps its own: the system fills new pages with zeros, which can take as long as the product.
    """
    if device.type != "cpu":
        return torch.empty(rows, vocab, dtype=dtype, device=device)
    held: Tensor | None = getattr(_held, "logits", None)
    if held is None or held.dtype != dtype or held.numel() < rows * vocab:
        held = _held.logits = None  # before there is another
        with torch.inference_mode(False):  # what is made within can't be written without
            held = _held.logits = torch.empty(rows * vocab, dtype=dtype)
        if form == "cpu":
            build.function("head_loss", "rwkv_large_pages", "2q")(held.data_ptr(), held.nbytes)
    return held[: rows * vocab].view(rows, vocab)


_held = threading.local()


def _slices(weight: Tensor) -> Iterator[slice]:
    """Of its rows, CONVERTED values each."""
    step = max(CONVERTED // max(weight.shape[1], 1), 1)
    return (slice(first, first + step) for first in range(0, len(weight), step))


def _parts(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight's rows in another dtype, some at a time, lest all of it stands in memory twice; in its own, all at once."""
    if weight.dtype is dtype:
        yield slice(None), weight
        return
    for part in _slices(weight):
        yield part, weight[part].to(dtype)


# The pass over a block: nll of its rows (not weighted) and, if that is wanted, the gradient of the logits in their place.
# z (rows, V), targets (rows,), counts (rows,) the weights or None for 1, nll (rows,).
_Fused = Callable[[Tensor, Tensor, Tensor | None, float, Tensor, bool], None]


def _fused(form: str) -> _Fused:
    if form == "cpu":
        return _fused_cpu
    if form == "triton":
        from kernels import head_loss_triton

        return head_loss_triton.fused
    if form == "torch":
        return _fused_torch
    raise ValueError(f"form={form!r}; it must be one of {FORMS}; say op='auto'")


def _fused_cpu(z: Tensor, targets: Tensor, counts: Tensor | None, l2_wrap: float, nll: Tensor, wants: bool) -> None:
    build.function("head_loss", "rwkv_head_loss", "6qd3q")(
        z.data_ptr(), targets.data_ptr(), 0 if counts is None else counts.data_ptr(), nll.data_ptr(), *z.shape, l2_wrap,
        z.dtype is torch.bfloat16, wants, build.threads(),
    )  # fmt: skip


def _fused_torch(z: Tensor, targets: Tensor, counts: Tensor | None, l2_wrap: float, nll: Tensor, wants: bool) -> None:
    log_p = torch.log_softmax(z, 1, dtype=nll.dtype)
    rows = torch.arange(len(z), device=z.device)
    torch.neg(log_p[rows, targets], out=nll)
    if wants:
        dz = log_p.exp_()  # in place: these are the largest tensors of a training step
        dz[rows, targets] -= 1
        if l2_wrap:
            largest, where = z.max(1)
            dz[rows, where] += l2_wrap * largest.to(dz.dtype)
        if counts is not None:
            dz *= counts[:, None]
        z.copy_(dz)
