"""An example of every way to train a model, and a few more."""

from rwkv_core.config import BatConfig, BoneConfig, FullConfig, LoraConfig, PissaConfig, StateConfig

SOME = {"targets": ("att.receptance", "att.value", "ffn.*"), "layers": "all", "also": (), "state": "none"}

EXAMPLES = [
    LoraConfig(kind="lora", rank=3, alpha=7.5, rank_stabilized=False, dropout=0.0, dora=False, **SOME),
    PissaConfig(kind="pissa", rank=3, iterations=4, **SOME),
    BoneConfig(kind="bone", rank=5, **SOME),
    BatConfig(kind="bat", rank=8, **SOME),
    FullConfig(kind="full", layers="all", also=("*",), state="none"),
    StateConfig(kind="state", state="wkv", layers="all", also=()),
]
OTHERS = [
    LoraConfig(
        kind="lora", rank=9, alpha=4.0, rank_stabilized=True, dropout=0.0, dora=False,
        targets=("att.*",), layers="0-1", also=("ln*", "ln_out.*", "emb.weight"), state="none",
    ),
    BoneConfig(kind="bone", rank=32, targets=("att.key", "ffn.key"), layers="2 0", also=("att.ln_x.*",), state="wkv"),
    LoraConfig(
        kind="lora", rank=4, alpha=8.0, rank_stabilized=False, dropout=0.0, dora=False,
        targets=("ffn.*",), layers="0", also=("ln2.*",), state="wkv and token shift",
    ),
    LoraConfig(kind="lora", rank=3, alpha=7.5, rank_stabilized=False, dropout=0.0, dora=True, **SOME),
    FullConfig(kind="full", layers="1", also=("att.*", "head.weight"), state="none"),
    StateConfig(kind="state", state="wkv and token shift", layers="all", also=("ln_out.*",)),
]  # fmt: skip
"""More settings of the same."""
