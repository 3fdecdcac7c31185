"""A part of the source, with the usual settings but for some."""

from typing import Any

from rwkv_core.config import PartConfig


def part(**changes: Any) -> PartConfig:
    """Learns all of every text, as it is."""
    usual = {
        "name": "all", "files": "*", "kind": "auto", "columns": {}, "blank_lines": "collapse", "think": "as_given",
        "mask": "none", "marks": None, "weight": 1,
    }  # fmt: skip
    return PartConfig.model_validate(usual | changes)
