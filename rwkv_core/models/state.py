"""What a model carries from token to token.

Shapes: B batch, C channels, H heads, N head size.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_core.errors import InputError


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


def mount(state: State, tuned: Mapping[str, Tensor]) -> State:
    """The state with its WKV parts replaced by those of a state file, the result of state tuning.

    Args:
        state: from `initial_state`, of RWKV-5, 6 or 7.
        tuned: as the official state files have it: "blocks.0.att.time_state" (H, N, N), rows values, columns keys, for every
            block; or (B, H, N, N), one for each row of the batch.

    Raises:
        InputError: a block is missing, another name is there, or a shape is not this model's.
    """
    names = [f"blocks.{i}.att.time_state" for i in range(len(state))]
    wrong = sorted(tuned.keys() ^ set(names))
    if wrong:
        fault = "is missing" if wrong[0] in names else "is no state of this model"
        raise InputError(
            wrong[0], f"{fault}: a state file has time_state for each of {len(names)} blocks", "give a whole one"
        )
    mounted = []
    for name, block in zip(names, state, strict=True):
        x, want = tuned[name], block.wkv.shape
        if len(want) != 4 or x.shape not in (want, want[1:]):
            rule = f"this model's is {tuple(want[1:])}" if len(want) == 4 else "RWKV-4 has no matrix for a state"
            raise InputError(f"{name} is {tuple(x.shape)}", rule, "give a state tuned on this model")
        mounted.append(block._replace(wkv=x.to(block.wkv).expand(want)))
    return mounted
