"""An example of every way to train a model, and a few more."""

from rwkv_core.config import BatConfig, BoneConfig, FullConfig, LoraConfig, PissaConfig, StateConfig

NEW = {"state": "none", "load": None}
SOME = {"targets": ("att.receptance", "att.value", "ffn.*"), "layers": "all", "also": (), **NEW}
PLAIN = {"kind": "lora", "rank_stabilized": False, "dropout": 0.0, "dora": False}

EXAMPLES = [
    LoraConfig(rank=3, alpha=7.5, **PLAIN, **SOME),
    PissaConfig(kind="pissa", rank=3, iterations=4, load_init=None, **SOME),
    BoneConfig(kind="bone", rank=5, **SOME),
    BatConfig(kind="bat", rank=8, **SOME),
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
