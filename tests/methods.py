"""An example of every way to train a model, and a few more."""

from rwkv_core.config import BatConfig, BoneConfig, FullConfig, LoraConfig, PissaConfig

NEW = {"load": None}
SOME = {"targets": ("att.receptance", "att.value", "ffn.*"), "layers": "all", "also": (), **NEW}

EXAMPLES = [
    LoraConfig(kind="lora", rank=3, alpha=7.5, rank_stabilized=False, dropout=0.0, **SOME),
    PissaConfig(kind="pissa", rank=3, iterations=4, load_init=None, **SOME),
    BoneConfig(kind="bone", rank=5, **SOME),
    BatConfig(kind="bat", rank=8, **SOME),
    FullConfig(kind="full", layers="all", also=("*",), **NEW),
]
OTHERS = [
    LoraConfig(
        kind="lora", rank=9, alpha=4.0, rank_stabilized=True, dropout=0.0,
        targets=("att.*",), layers="0-1", also=("ln*", "ln_out.*", "emb.weight"), **NEW,
    ),
    BoneConfig(kind="bone", rank=32, targets=("att.key", "ffn.key"), layers="2 0", also=("att.ln_x.*",), **NEW),
    LoraConfig(
        kind="lora", rank=2, alpha=4.0, rank_stabilized=False, dropout=0.0,
        targets=("att.key",), layers="0 2", also=("ln_out.*", "emb.weight[3 60-63]", "head.weight[60-63]"), **NEW,
    ),
    FullConfig(kind="full", layers="1", also=("att.*", "head.weight"), **NEW),
]  # fmt: skip
"""More settings of the same."""
