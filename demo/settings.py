"""demo/params.yaml, as typed sections."""

from pathlib import Path

from pydantic import Field

from rwkv_core.config import Config, TrainConfig

FILE = Path("demo/params.yaml")
OUTPUTS = Path("demo/outputs")


class CorpusSettings(Config):
    """How the documentation is shared out."""

    share: float = Field(gt=0, lt=1)
    """Share of the topics that become questions and answers; the others are read in pretraining."""


class PretrainSettings(Config):
    """The small base."""

    seed: int = Field(ge=0)
    """Of its initial values and of the order of the documents."""

    n_layer: int = Field(ge=1)
    """Blocks."""

    n_embd: int = Field(ge=8)
    """Channels, a multiple of head_size."""

    head_size: int = Field(ge=8)
    """Channels a head. Clients expect 64."""

    train: TrainConfig


class DemoSettings(Config):
    """Every value of the demo's stages."""

    corpus: CorpusSettings
    pretrain: PretrainSettings
