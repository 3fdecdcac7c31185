"""What a model carries from token to token.

Shapes: B batch, C channels, H heads, N head size.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_core.errors import InputError
from rwkv_core.formats import tuned_state


class BlockState(NamedTuple):
    """What one block carries."""

    att_shift: Tensor
    """(B, C): what time mixing read last, layer-normed."""
    wkv: Tensor
    """float32. RWKV-5, 6 and 7: (B, H, N, N), rows are values, columns are keys. RWKV-4: (B, 3, C), see kernels.wkv4."""
    ffn_shift: Tensor
    """(B, C): what channel mixing read last, layer-normed."""


State = list[BlockState]


def select(state: State, rows: Sequence[int]) -> State:
    """The state of some rows of a batch; a row may be taken more than once."""
    index = torch.tensor(rows, device=state[0].wkv.device)
    return [BlockState(*(x.index_select(0, index) for x in block)) for block in state]


def concatenate(states: Sequence[State]) -> State:
    """One batch of the rows of several."""
    return [
        BlockState(*(torch.cat(parts) for parts in zip(*blocks, strict=True))) for blocks in zip(*states, strict=True)
    ]


_FIELDS = {tuned_state.WKV: "wkv", **dict(zip(tuned_state.SHIFTS, ("att_shift", "ffn_shift"), strict=True))}


def mount(state: State, tuned: Mapping[str, Tensor]) -> State:
    """The state with parts replaced by those of a tuned one. Gradients reach these.

    Args:
        state: from `initial_state`, of RWKV-5, 6 or 7.
        tuned: see `rwkv_core.formats.tuned_state`; the WKV state of every block, and the token shift of all or of none. Each
            may have a batch in front, one for each row.

    Raises:
        InputError: a block is missing, another name is there, or a shape is not this model's.
    """
    shifted = any(name.endswith(tuned_state.SHIFTS) for name in tuned)
    parts = tuned_state.PARTS["wkv and token shift" if shifted else "wkv"]
    names = [f"blocks.{i}.{part}" for i in range(len(state)) for part in parts]
    wrong = sorted(tuned.keys() ^ set(names))
    if wrong:
        fault = "is missing" if wrong[0] in names else "is no state of this model"
        raise InputError(
            wrong[0], f"{fault}: a state file has time_state for each of {len(state)} blocks", "give a whole one"
        )
    mounted = []
    for i, block in enumerate(state):
        if block.wkv.ndim != 4:
            raise InputError(
                "a tuned state", "RWKV-4 has no matrix for a state", "give it to the model that it was tuned on"
            )
        changed = {}
        for part in parts:
            name, into = f"blocks.{i}.{part}", getattr(block, _FIELDS[part])
            x = tuned[name]
            if x.shape not in (into.shape, into.shape[1:]):
                rule = f"this model's is {tuple(into.shape[1:])}"
                raise InputError(f"{name} is {tuple(x.shape)}", rule, "give a state tuned on this model")
            changed[_FIELDS[part]] = x.to(into).expand(into.shape)
        mounted.append(block._replace(**changed))
    return mounted


def unmount(state: State) -> dict[str, Tensor]:
    """A state of one row under the names of a state file, with its token shift: the inverse of `mount`."""
    return {
        f"blocks.{i}.{part}": getattr(block, field)[0]
        for i, block in enumerate(state)
        for part, field in _FIELDS.items()
    }
