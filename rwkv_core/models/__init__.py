"""Models by version. `load` reads a checkpoint and finds out what it is."""

from pathlib import Path

import torch

from kernels.wkv7 import Op
from rwkv_core import checkpoint
from rwkv_core.errors import InputError
from rwkv_core.models.rwkv7 import RWKV7


def load(path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu", op: Op = "auto") -> RWKV7:
    """The model in a checkpoint; version, sizes and ranks are read from it.

    Args:
        path: a .pth file.
        dtype: of the parameters; None keeps the file's.
        device: where to put them.
        op: implementation of the WKV operator.

    Raises:
        InputError: the file can't be read, is another model, or has tensors missing, left over or of a wrong shape.
    """
    tensors = checkpoint.read(path)
    with torch.device("meta"):
        model = RWKV7(checkpoint.shape(tensors, path), op)
    wanted = model.state_dict()
    missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    wrong = [name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape]
    faults = {"lacks": missing, "has the unknown": unexpected, "has of a wrong shape": wrong}
    if any(faults.values()):
        listed = "; ".join(f"{fault} {', '.join(sorted(names)[:3])}" for fault, names in faults.items() if names)
        raise InputError(f"{path}: {listed}", "must be an RWKV-7 model's tensors", "give a whole checkpoint")
    # one tensor at a time: a second copy of the whole model is never in memory
    for name in list(tensors):
        tensors[name] = tensors[name].to(device=device, dtype=dtype or tensors[name].dtype)
    model.load_state_dict(tensors, assign=True)
    return model
