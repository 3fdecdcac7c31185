"""Small checkpoints of every version, and every form to store them in."""

import json

import safetensors.torch
import torch

from rwkv_core.formats import huggingface, order, web_rwkv
from rwkv_core.models.rwkv4 import RWKV4
from rwkv_core.models.rwkv5 import RWKV5
from rwkv_core.models.rwkv6 import RWKV6
from rwkv_core.models.rwkv7 import RWKV7

VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7")


def official(version, *, n_layer=2, n_embd=40, head_size=8, vocab_size=24, dtype=torch.float16, seed=0):
    """A checkpoint in which no two numbers need be equal, in the official order; float16 values, so that .st holds them."""
    sizes = (n_layer, n_embd, head_size, vocab_size)
    model = {"4": RWKV4, "6": RWKV6, "7": RWKV7}.get(version, RWKV5)
    shape = model.new_shape(*sizes, version) if model is RWKV5 else model.new_shape(*sizes)
    generator = torch.Generator().manual_seed(seed)
    tensors = order.official(model(shape).state_dict())
    return {name: torch.randn(x.shape, generator=generator).half().to(dtype) for name, x in tensors.items()}


def save_pth(folder, tensors, name="model.pth"):
    torch.save(tensors, folder / name)
    return folder / name


def save_legacy(folder, tensors):
    torch.save(tensors, folder / "model.pth", _use_new_zipfile_serialization=False)
    return folder / "model.pth"


def save_safetensors(folder, tensors, name="model.safetensors"):
    safetensors.torch.save_file({n: x.contiguous().clone() for n, x in tensors.items()}, folder / name)
    return folder / name


def save_st(folder, tensors):
    web_rwkv.write(folder / "model.st", tensors)
    return folder / "model.st"


def save_huggingface(folder, tensors, parts=2):
    """As save_pretrained does."""
    (folder / "config.json").write_text(json.dumps({"model_type": "rwkv", "head_dim": 8}))
    return save_parts(folder, huggingface.from_official(tensors), parts)


def save_parts(folder, tensors, parts=2):
    """Parts of about the same size, and an index."""
    names, where = sorted(tensors), {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        mine = names[i::parts]
        save_safetensors(folder, {name: tensors[name] for name in mine}, file)
        where |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


FORMS = {
    "pth": save_pth,
    "legacy pth": save_legacy,
    "safetensors": save_safetensors,
    "st": save_st,
    "Hugging Face": save_huggingface,
}


def same(one, other):
    """Equal tensors of equal shapes and dtypes, in the same order."""
    assert list(one) == list(other)
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(one[name], other[name]), name
