"""Files for clients, and a check of every file that is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_core import checkpoint
from rwkv_core.checkpoint import Dtype
from rwkv_core.errors import Problem
from rwkv_core.files import sha256
from rwkv_core.formats import web_rwkv


def export(model: Path, out: Path, formats: tuple[str, ...], dtype: Dtype) -> dict[str, Any]:
    """Write `model` in each of `formats` into the folder `out`, read each file back, and report.

    Returns:
        The digest of `model`, and for each format: the file, its digest and size, and what reading it back gave.

    Raises:
        InputError: the model can't be read, or a value does not fit the format's precision.
    """
    tensors = checkpoint.read(model)
    report: dict[str, Any] = {}
    for name in formats:
        file = out / f"model.{name}"
        if name == "pth":
            checkpoint.check_values(tensors, checkpoint.DTYPES.get(dtype))
            checkpoint.write(file, tensors, dtype)
        else:
            checkpoint.check_values(tensors, torch.float16)
            web_rwkv.write(file, tensors)
        report[name] = {
            "file": file.name,
            "sha256": sha256(file),
            "bytes": file.stat().st_size,
            **_check(tensors, checkpoint.read(file)),
        }
    return {"merged": {"sha256": sha256(model)}, "formats": report}


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
