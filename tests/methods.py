"""An example of every way to train a model, and a few more."""

import torch

from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach, file, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.config import BatConfig, BoneConfig, FullConfig, LoraConfig, PeftConfig, PissaConfig, StateConfig
from rwkv_core.files import sha256
from rwkv_core.formats import tuned_state
from rwkv_core.models.state import mount

NEW = {"state": "none", "load": None}
SOME = {"targets": ("att.receptance", "att.value", "ffn.*"), "layers": "all", "also": (), **NEW}
PLAIN = {"kind": "lora", "rank_stabilized": False, "dropout": 0.0, "dora": False}

EXAMPLES = [
    LoraConfig(rank=3, alpha=7.5, **PLAIN, **SOME),
    PissaConfig(kind="pissa", rank=3, iterations=4, load_init=None, **SOME),
    BoneConfig(kind="bone", rank=5, **SOME),
    BatConfig(kind="bat", rank=8, **SOME),
    PeftConfig(kind="peft", config={"peft_type": "LOHA", "r": 3, "alpha": 6}, **SOME),
    FullConfig(kind="full", layers="all", also=("*",), **NEW),
    StateConfig(kind="state", state="wkv", layers="all", also=(), load=None),
]
OTHERS = [
    LoraConfig(
        rank=9, alpha=4.0, **PLAIN | {"rank_stabilized": True},
        targets=("att.*",), layers="0-1", also=("ln*", "ln_out.*", "emb.weight"), **NEW,
    ),
    BoneConfig(
        kind="bone", rank=32, targets=("att.key", "ffn.key"), layers="2 0", also=("att.ln_x.*",), **NEW | {"state": "wkv"}
    ),
    LoraConfig(
        rank=4, alpha=8.0, **PLAIN, targets=("ffn.*",), layers="0", also=("ln2.*",), **NEW | {"state": "wkv and token shift"}
    ),
    LoraConfig(rank=3, alpha=7.5, **PLAIN | {"dora": True}, **SOME),
    LoraConfig(
        rank=2, alpha=4.0, **PLAIN,
        targets=("att.key",), layers="0 2", also=("ln_out.*", "emb.weight[3 60-63]", "head.weight[60-63]"), **NEW,
    ),
    FullConfig(kind="full", layers="1", also=("att.*", "head.weight"), **NEW),
    StateConfig(kind="state", state="wkv and token shift", layers="all", also=("ln_out.*",), load=None),
]  # fmt: skip
"""More settings of the same."""

PEFT = [
    {"peft_type": "LORA", "r": 3, "lora_alpha": 7.5},
    {"peft_type": "LORA", "r": 4, "use_rslora": True, "use_dora": True},
    {"peft_type": "LOHA", "r": 3, "alpha": 6},
    {"peft_type": "LOKR", "r": 3, "alpha": 6, "decompose_factor": 4},
    {"peft_type": "IA3"},
    {"peft_type": "OFT", "oft_block_size": 8},
    {"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2},
    {"peft_type": "MISS", "r": 8},
    {"peft_type": "MISS", "r": 8, "init_weights": "bat"},
    {"peft_type": "MISS", "r": 8, "mini_r": 4, "init_weights": "mini"},
    {"peft_type": "FOURIERFT", "n_frequency": 60, "scaling": 20.0, "init_weights": True},
    {"peft_type": "WAVEFT", "n_frequency": 60},
    {"peft_type": "C3A", "block_size": 8},
    {"peft_type": "HRA", "r": 4},
    {"peft_type": "HIRA", "r": 4},
    {"peft_type": "ROAD", "group_size": 8, "variant": "road_2"},
    {"peft_type": "DEFT", "r": 4},
    {"peft_type": "DELORA", "r": 4},
    {"peft_type": "GLORA", "r": 4},
    {"peft_type": "GRALORA", "r": 8, "gralora_k": 2},
    {"peft_type": "PEANUT", "r": 4},
    {"peft_type": "SHIRA", "r": 3},
    {"peft_type": "SUPERTUNING", "r": 4},
]
"""Settings of Hugging Face's peft: at least one of every method of it that works here."""


def begun(path, batch):
    """A merged model, and what it begins from: the tuned state beside it, as much of that as there is, or None."""
    model, state = models.load(path), path.with_suffix(".state.pth")
    files = [x for x in (tuned_state.whole(state), state) if x.exists()]
    return model, mount(model.initial_state(batch), checkpoint.read(files[0])) if files else None


def train(model, tokens, steps=5, lr=0.05):
    """Enough for every part of an adapter to have moved."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        out, _ = model(tokens[:, :-1])
        torch.nn.functional.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def adapter(base, config, path):
    """A file of an adapter whose every value is random, as if it had been trained on the model in `base`."""
    model = models.load(base, dtype=torch.float32)
    attach(model, config, seed=0)
    generator = torch.Generator().manual_seed(2)
    tensors = {name: 0.3 * torch.randn(x.shape, generator=generator) for name, x in trained_state(model).items()}
    about = {"format": 1, "adapter": config, "base_sha256": sha256(base), "data_sha256": "", "vocabulary_sha256": ""}
    file.write(path, tensors, AdapterRecord(**about, run="r"))
    return path
