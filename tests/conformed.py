"""Small models whose files clients take: heads of 64, World's tokens, and the files themselves, made once for many tests."""

from pathlib import Path

import random_models
import torch

from rwkv_core import checkpoint, huggingface_folder
from rwkv_core.formats import gguf, huggingface, web_rwkv
from rwkv_core.models.skeleton import RWKV
from rwkv_core.tokenizer import world


def model(version: str = "7", *, n_layer: int = 2, vocab_size: int = 64, seed: int = 0) -> RWKV:
    """Two heads of 64; every parameter is random, none is like another."""
    return random_models.make(
        version=version, n_layer=n_layer, n_embd=128, head_size=64, vocab_size=vocab_size, seed=seed
    )


def write(folder: Path, made: RWKV, form: str, name: str = "model") -> Path:
    """The file or folder of a format, as the export writes it."""
    tensors = {key: x.bfloat16() for key, x in made.state_dict().items()}
    of_world = made.config.vocab_size == len(world().table)
    match form:
        case "pth":
            path = folder / f"{name}.pth"
            checkpoint.write(path, tensors)
        case "st":
            path = folder / f"{name}.st"
            web_rwkv.write(path, tensors)
        case "hf":
            path = folder / name
            table = world().table if of_world else ()
            huggingface_folder.write(path, tensors, made.config, torch.bfloat16, part_bytes=20_000_000, table=table)
        case _:
            path = folder / f"{name}-{form}.gguf"
            gguf.write(path, tensors, form, world().table)
    return path


def state(made: RWKV, seed: int = 1) -> dict[str, torch.Tensor]:
    """A tuned state of a model."""
    config, generator = made.config, torch.Generator().manual_seed(seed)
    shape = (config.n_embd // config.head_size, config.head_size, config.head_size)
    return {
        f"blocks.{i}.att.time_state": 0.3 * torch.randn(shape, generator=generator).bfloat16()
        for i in range(config.n_layer)
    }


def write_state(folder: Path, tensors: dict[str, torch.Tensor], form: str) -> Path:
    """The state's file of a format."""
    match form:
        case "pth":
            checkpoint.write(folder / "state.pth", tensors)
            return folder / "state.pth"
        case "st":
            web_rwkv.write(folder / "model.state", tensors)
            return folder / "model.state"
    huggingface.write_state(folder / "state.fla.safetensors", tensors)
    return folder / "state.fla.safetensors"
