"""What data is prepared by in tests: params.yaml's own values, and what a test says otherwise."""

from pathlib import Path

from rwkv_core.config import DataConfig, PartConfig
from tasks.params import load

ROOT = Path(__file__).parent.parent


def part(**changes) -> PartConfig:
    """The part of params.yaml, changed."""
    return PartConfig(**load(ROOT / "params.yaml").data.parts[0].model_dump() | changes)


def data(source: Path, *parts: PartConfig, **changes) -> DataConfig:
    """The data of params.yaml, changed; settings of the split are given by their own names."""
    values = load(ROOT / "params.yaml").data.model_dump()
    holdout = {name: changes.pop(name) for name in list(changes) if name in values["holdout"]}
    values |= {"source": source, "parts": parts or (part(),)} | changes
    values["holdout"] |= {"fraction": 0.3, "group": None, "near_duplicates": None} | holdout
    return DataConfig.model_validate(values)
