"""The model card: of a checkout's export, and of a registered version, whose folder is laid out as a checkout is."""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from rwkv_core import card
from rwkv_core.config import CardConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from tasks import mirror, stage
from tasks.evidence import facts, lineage
from tasks.record import RunRecord

NAME = "README.md"
"""In the folder of the exported files."""


def text(root: Path, conformance: Mapping[str, Any], settings: CardConfig) -> str:
    """The card of the model in a checkout, or in a version's folder.

    Args:
        root: the folder.
        conformance: of its export, see `rwkv_core.export`; empty if it was not exported.
        settings: what only its owner knows.

    Raises:
        InputError: there is no record of its training.
    """
    try:
        record = RunRecord.read(root / stage.TRAIN)
    except FileNotFoundError:
        raise InputError(
            str(root / stage.TRAIN), "has no record of a training", "run the pipeline first: rwkvflow run"
        ) from None
    judged, state = mirror.read_json(root / stage.EVALUATE / "receipt.json").get("tuned"), stage.mounted(root)
    tuned = {"sha256": mirror.read_json(root / stage.MERGED / "receipt.json").get("merged", {}).get("sha256")}
    if state is not None:
        tuned["state_sha256"] = sha256(state)
    # what another model was judged as is nothing to say of this one
    comparison = mirror.read_json(root / stage.EVALUATE / "metrics.json") if judged == tuned else {}
    subject = card.Subject(
        base=record.base,
        kind=str(record.params["adapter"]["kind"]),
        source=PurePath(str(record.data.get("path", "unknown"))),
        tokenizer=str(record.params["data"]["tokenizer"]),
        conformance=conformance,
        comparison=comparison or None,
        facts=facts(root, record),
        lineage=lineage(root, record),
    )
    return card.text(subject, settings)
