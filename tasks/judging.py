"""What models are judged with, in the evaluate stage and for a promotion alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_core.checkpoint import Dtype
from rwkv_core.data.whole import Source
from rwkv_core.evaluation.store import Store
from tasks.params import Params
from tasks.record import main_root

STORE = Path(".rwkvflow/scores")
"""What is known of models, in the main checkout: bases are the same in all experiments."""


def store(root: Path) -> Store:
    """What is known of models: in a checkout, the main one's; elsewhere, the user's."""
    return Store(main_root(root) / STORE) if (root / "params.yaml").exists() else Store.of_user()


def sources(manifest: Mapping[str, Any]) -> list[Source]:
    """The parts of data.parts in the held-out documents, by a preparation's manifest."""
    valid = manifest["valid"]
    whole = [{"name": "all", "first": 0, "documents": valid["documents"]}]  # as early manifests say nothing of parts
    return [Source(part["name"], part["first"], part["documents"]) for part in valid.get("parts", whole)]


def precision(params: Params) -> Dtype:
    """What models are judged in: as they were trained."""
    return "bf16" if params.train.precision == "bf16" else "fp32"
