"""State tuning: what is trained is the state that a model begins a document from.

    S_0 = D        D (H, N, N) for each block, 0 at first: the model as it was, without the token 0 before a document

And, if asked for, the token before the first, of time mixing and of channel mixing. No matrix changes, so nothing is merged,
and a token costs what it did. The state stands where token 0 stood: the document's first token is read after it, and not
predicted.
Source: RWKV-PEFT, `--train_type state`, and the names of its unfinished token-shift state.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rwkv_core.adapters.linear import wide
from rwkv_core.errors import InputError
from rwkv_core.formats.tuned_state import PARTS, SHIFTS, WKV


def give(model: nn.Module, kind: str) -> None:
    """Give a model the parameters of a tuned state, of zeros; `RWKV.initial_state` takes them.

    Args:
        model: with its blocks under `blocks.<i>.`.
        kind: which parts of the state, a key of PARTS.

    Raises:
        InputError: an RWKV-4.
    """
    for name, x in zeros(dict(model.named_parameters()), kind).items():
        module, _, part = name.rpartition(".")
        model.get_submodule(module).register_parameter(part, nn.Parameter(x))


def zeros(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """An untuned state for a model of these tensors, in the order of its blocks.

    Its precision is the model's, where clients read it from a state file: bfloat16, else float32 or more.

    Args:
        tensors: a model's.
        kind: which parts of the state, a key of PARTS.

    Raises:
        InputError: an RWKV-4.
    """
    if kind == "none":
        return {}
    vectors = [tensors.get(f"blocks.0.att.{name}") for name in ("ln_x.weight", "r_k", "time_faaaa", "time_first")]
    norm, heads = vectors[0], next((len(x) for x in vectors[1:] if x is not None), 0)
    if norm is None:
        raise InputError(
            f"adapter.state = {kind}", "RWKV-4 has no matrix for a state", "set none, or take an RWKV-5 to 7"
        )
    size, channels = len(norm) // heads, len(tensors["ln_out.weight"])
    shapes = {WKV: (heads, size, size), **dict.fromkeys(SHIFTS, (channels,))}
    dtype = norm.dtype if norm.dtype == torch.bfloat16 else wide(norm)
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    return {
        f"blocks.{i}.{part}": torch.zeros(shapes[part], dtype=dtype, device=norm.device)
        for i in range(blocks)
        for part in PARTS[kind]
    }
