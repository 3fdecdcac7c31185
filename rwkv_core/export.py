"""Files for clients, and a check of every file that is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.head_loss import token_nll
from rwkv_core import checkpoint, models
from rwkv_core.checkpoint import Dtype
from rwkv_core.errors import Problem
from rwkv_core.files import sha256
from rwkv_core.formats import tuned_state, web_rwkv
from rwkv_core.models.state import mount

_ROUNDING = 0.1
"""Nats a token that rounding can't explain: 0.003 are what the least change of a weight leads to in bfloat16."""

STATES = {"pth": "state.pth", "st": "model.state"}
"""Where a tuned state is written, by format; Ai00 wants the ending .state."""


def export(model: Path, out: Path, formats: tuple[str, ...], dtype: Dtype, state: Path | None = None) -> dict[str, Any]:
    """Write `model` in each of `formats` into the folder `out`, read each file back, and report.

    Args:
        model: a checkpoint.
        out: the folder.
        formats: pth, st.
        dtype: of a .pth; a state file keeps its own, as its readers take bfloat16 and float32 alone.
        state: a file of a tuned state to write beside it, for clients: without its token shift, if it has that.

    Returns:
        The digests of `model` and `state`, and for each format: the file, its digest and size, and what reading it back gave;
        the same of the state, and how far both files together are from `model` and `state`, in nats a token.

    Raises:
        InputError: the model can't be read, or a value does not fit the format's precision.
    """
    tensors, made_of = checkpoint.read(model), {"sha256": sha256(model)}
    report = {name: _export(tensors, out / f"model.{name}", name, dtype) for name in formats}
    if state is not None:
        made_of["state_sha256"] = sha256(state)
        tuned = tuned_state.for_clients(checkpoint.read(state))
        precision = torch.bfloat16 if {x.dtype for x in tensors.values()} == {torch.bfloat16} else torch.float32
        wanted = _nats(model, tuned, precision)
        for name in formats:
            entry = _export(tuned, out / STATES[name], name, "as_loaded")
            got = _nats(out / f"model.{name}", checkpoint.read(out / STATES[name]), precision)
            report[name]["state"] = entry | {"change_in_nats": _compare(wanted, got)}
    return {"merged": made_of, "formats": report}


@torch.no_grad()
def _nats(model: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """(T,), the cross-entropy of each of some tokens after a state, with the usual head size divisor: to compare two files."""
    loaded = models.load(model, dtype=dtype).eval()
    tokens = torch.arange(1, 34)[None] * 97 % loaded.config.vocab_size
    features, _ = loaded.features(tokens[:, :-1], mount(loaded.initial_state(1), state))
    return token_nll(features.flatten(0, 1), loaded.head.weight, tokens[0, 1:])


def _compare(wanted: Tensor, got: Tensor) -> float:
    """The mean change of a token's cross-entropy."""
    change = float((wanted - got).abs().mean())
    if not change < _ROUNDING:
        raise Problem(
            f"after the exported state a token changes by {change:g} nats",
            f"rounding is less than {_ROUNDING:g}",
            "report this as a defect",
        )
    return change


def _export(tensors: Mapping[str, Tensor], file: Path, form: str, dtype: Dtype) -> dict[str, Any]:
    """Write a file, read it back, and report."""
    if form == "pth":
        checkpoint.check_values(tensors, checkpoint.DTYPES.get(dtype))
        checkpoint.write(file, tensors, dtype)
    else:
        checkpoint.check_values(tensors, torch.float16)
        web_rwkv.write(file, tensors)
    return {
        "file": file.name,
        "sha256": sha256(file),
        "bytes": file.stat().st_size,
        **_check(tensors, checkpoint.read(file)),
    }


def _check(source: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the conversion and its inverse have left of every tensor."""
    if list(source) != list(back) and set(source) != set(back):
        missing = sorted(set(source) ^ set(back))
        raise Problem(
            f"tensors {', '.join(missing[:3])}", "an export must hold every tensor", "report this as a defect"
        )
    largest, flushed, total = 0.0, 0, 0
    for name, x in source.items():
        y = back[name]
        if x.shape != y.shape:
            raise Problem(
                f"{name} came back as {tuple(y.shape)}", f"it was {tuple(x.shape)}", "report this as a defect"
            )
        exact, got = x.float(), y.float()
        if not torch.equal(exact.to(y.dtype), y):
            raise Problem(f"{name} came back changed", "by more than its rounding", "report this as a defect")
        largest = max(largest, float((exact - got).abs().max()))
        flushed += int(((got == 0) & (exact != 0)).sum())
        total += x.numel()
    return {"tensors": len(source), "parameters": total, "largest_rounding": largest, "flushed_to_zero": flushed}
