"""Small runs that something harms, or stops."""

import math

import torch
from random_models import make
from train_settings import train_config

from rwkv_core import checkpoint, models
from rwkv_core.adapters import attach, trained_state
from rwkv_core.config import LoraConfig
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.rows import rows
from rwkv_core.files import sha256
from rwkv_core.training.fit import fit

LORA = LoraConfig(
    kind="lora", rank=2, alpha=4, dropout=0.2, dora=False, rank_stabilized=False, targets=("att.*", "ffn.*"), layers="all",
    also=(), state="none", load=None,
)  # fmt: skip
BAD = 62
"""A token that the harm is tied to."""
LOAD = {"head_size_divisor": None, "op": "auto", "quantize": "none"}


def settings(guards=None, **changes):
    values = {
        "ctx_len": 24, "rows": "pad", "micro_batch": 2, "accumulate": 2, "validate_every": 4, "validate_rows": 4,
        "checkpoint_every": 4, "epochs": None, "steps": 14,
        "optimizer": {"lr": 0.01, "lr_final": 0.001, "schedule": "cosine", "weight_decay": 0.01, "grad_clip": 1.0},
    }  # fmt: skip
    return train_config(**values | changes, guards=guards or {})


def write(prefix, planted, zero=(), count=60):
    """Documents that count upwards; those `planted` have the bad token, and those in `zero` count nothing."""
    generator = torch.Generator().manual_seed(1)
    writer = Writer(prefix)
    for i in range(count):
        first, size = torch.randint(1, 30, (2,), generator=generator).tolist()
        middle = [BAD] if i in planted else []
        writer.add([first, *middle, *range(first, first + size), 0], weight=0.0 if i in zero else 1.0)
    writer.close()


def lay(folder):
    """A base whose embedding of the bad token is NaN, a sound one, and data with that token in one document, in `folder`."""
    model = make(n_layer=2)
    checkpoint.write(folder / "sound.pth", model.state_dict())
    with torch.no_grad():
        model.emb.weight[BAD] = math.nan
    checkpoint.write(folder / "base.pth", model.state_dict())
    write(folder / "train", planted={17})
    write(folder / "valid", planted=(), count=6)


class Stop(BaseException):
    """Ends a run; nothing catches it, as nothing catches a kill."""


def train(
    place, config, *, base="sound.pth", data="train", folder="run", adapter=LORA,
    change=lambda model: None, log=None, groups=None, tokenizer=None, keep=None,
):  # fmt: skip
    model = models.load(place / base)
    attach(model, adapter, seed=3)
    change(model)
    after_state = adapter.state != "none"
    (place / folder).mkdir(exist_ok=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    result = fit(
        model,
        groups(model) if groups else [{"params": trained, "weight_decay": 0.01}],
        rows(Documents(place / data), config, 5, after_state=after_state),
        rows(Documents(place / "valid"), config, None, after_state=after_state),
        config,
        seed=11,
        folder=place / folder,
        log=log or (lambda step, metrics: None),
        tokenizer=tokenizer,
        keep=keep,
        made_from={
            "adapter": adapter.model_dump(mode="json"),
            "base": str(place / base),
            "base_sha256": sha256(place / base),
            "load": LOAD,
            "dtype": "fp32",
        },
    )
    return model, result


def bits(model):
    return {name: x.clone() for name, x in trained_state(model).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def losses(result):
    return [row["loss"] for _, row in sorted(result.history["train"].items())]
