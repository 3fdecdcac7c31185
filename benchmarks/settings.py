"""Settings of training, for what is measured: params.yaml's, but for what a benchmark says."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rwkv_core.config import TrainConfig

_PARAMS = Path(__file__).parent.parent / "params.yaml"


def train_settings(**changes: Any) -> dict[str, Any]:
    """As a dictionary; a section's changes are of the fields named: optimizer={"lr": 1e-3}."""
    values: dict[str, Any] = YAML(typ="safe").load(_PARAMS.read_text(encoding="utf-8"))["train"]
    for name, value in changes.items():
        merges = isinstance(values[name], dict) and name != "mix"
        values[name] = values[name] | value if merges else value
    return values


def train_config(**changes: Any) -> TrainConfig:
    """As `training.fit` wants them."""
    return TrainConfig.model_validate(train_settings(**changes))
