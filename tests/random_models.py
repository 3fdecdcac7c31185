"""Small models of every version."""

import torch

from rwkv_core.models.rwkv4 import RWKV4
from rwkv_core.models.rwkv5 import RWKV5
from rwkv_core.models.rwkv6 import RWKV6, Shape6
from rwkv_core.models.rwkv7 import RWKV7, Shape7
from rwkv_core.models.skeleton import RWKV

VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7")


def make(
    *, version: str = "7", n_layer: int = 3, n_embd: int = 32, head_size: int = 8, vocab_size: int = 64,
    layer_0: bool = False, seed: int = 0, op: str = "auto",
) -> RWKV:  # fmt: skip
    """A model whose every parameter is random: as initialized, several of its matrices are zero."""
    sizes = (n_layer, n_embd, head_size, vocab_size)
    match version:
        case "4":
            model: RWKV = RWKV4(RWKV4.new_shape(*sizes), op)
        case "5.0" | "5.1" | "5.2":
            model = RWKV5(RWKV5.new_shape(*sizes, version=version), op)
        case "6":
            ffn = int(3.5 * n_embd) // 32 * 32
            model = RWKV6(Shape6("6", n_layer, n_embd, n_embd, ffn, head_size, vocab_size, 8.0, 4, 6), op)
        case _:
            shape = Shape7(
                "7", n_layer, n_embd, n_embd, 4 * n_embd, head_size, vocab_size, 8.0,
                decay_rank=8, a_rank=6, v_rank=4, gate_rank=10, value_residual_in_layer_0=layer_0,
            )  # fmt: skip
            model = RWKV7(shape, op)
    generator = torch.Generator().manual_seed(seed)
    model.initialize(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
