"""web-rwkv's and Ai00's .st: safetensors in float16, low-rank pairs transposed, names in lower case.

Source: the convert_safetensors.py that web-rwkv, Ai00 and RWKV Runner share, for RWKV-7.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from rwkv_core.checkpoint import check_values
from rwkv_core.files import whole_file

_TRANSPOSED = (".w1", ".w2", ".a1", ".a2", ".g1", ".g2", ".v1", ".v2", ".time_state")


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint's tensors as .st.

    Raises:
        InputError: a value is too large for float16, or not finite.
        WorldError: there is no room, or no permission.
    """
    check_values(tensors, torch.float16)
    converted: dict[str, Tensor] = {}
    for name, x in tensors.items():
        y = x.to(torch.float16)
        converted[name.lower()] = (y.mT if name.endswith(_TRANSPOSED) else y).contiguous().clone()
    with whole_file(path) as temporary:
        safetensors.torch.save_file(converted, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors leaves it to its owner alone


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .st file as they are in a .pth: the inverse of `write`, but for the precision."""
    tensors = safetensors.torch.load_file(path)
    return {name: x.mT.contiguous() if name.endswith(_TRANSPOSED) else x for name, x in tensors.items()}
