"""preview: what of the data is learned, to look at before hours go into it."""

import csv
import json
from typing import Any

import numpy as np

from rwkv_core.data import preview as page
from rwkv_core.data.binidx import SIDES, Documents
from rwkv_core.files import whole_folder, write_json
from rwkv_core.tokenizer import named
from tasks import stage
from tasks.params import load

SHOWN = 20
"""Documents on the page."""

EXAMPLES = 5
"""Findings of each kind on the page; lints.csv has all."""


def preview() -> None:
    """outputs/data -> outputs/preview: preview.html, and metrics.json with what train.ctx_len cuts off."""
    params = load()
    tokenizer = named(params.data.tokenizer, params.data.special_tokens)
    manifest = json.loads(stage.MANIFEST.read_text(encoding="utf-8"))
    sides = {side: Documents(stage.DATA / side) for side in SIDES}
    cut = {side: lost(documents, params.train.rows, params.train.ctx_len) for side, documents in sides.items()}
    with whole_folder(stage.PREVIEW) as out:
        page.write(
            out / "preview.html",
            sides["train"],
            tokenizer,
            ctx_len=params.train.ctx_len,
            rows=params.train.rows,
            count=SHOWN,
            manifest=manifest,
            findings=findings(),
        )
        write_json(out / "metrics.json", cut)
    train = cut["train"]
    print(
        f"{stage.PREVIEW / 'preview.html'} shows {min(SHOWN, len(sides['train']))} of {len(sides['train'])} documents; "
        f"train.ctx_len = {params.train.ctx_len} cuts {train['documents_cut']} of them off, {train['tokens_cut']} tokens"
    )


def lost(documents: Documents, rows: str, ctx_len: int) -> dict[str, int]:
    """What is beyond ctx_len of rows that are one document each; nothing, where rows are made otherwise."""
    if rows not in ("pad", "only"):
        return {"documents_cut": 0, "tokens_cut": 0}
    beyond = np.maximum(documents.sizes.astype(np.int64) - ctx_len, 0)
    return {"documents_cut": int(np.count_nonzero(beyond)), "tokens_cut": int(beyond.sum())}


def findings() -> list[dict[str, Any]]:
    """The first of each kind in lints.csv, as {"code", "where", "message"}."""
    found: dict[str, list[dict[str, Any]]] = {}
    with (stage.DATA / "lints.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kind = found.setdefault(row["code"], [])
            if len(kind) < EXAMPLES:
                kind.append({"code": row["code"], "where": row["where"], "message": row["message"]})
    return [finding for kind in found.values() for finding in kind]


if __name__ == "__main__":
    stage.main(preview)
