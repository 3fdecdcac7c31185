"""preview: what of the data is learned, to look at before hours go into it."""

import json
from pathlib import Path

from rwkv_core.data import preview as page
from rwkv_core.data.binidx import SIDES, Documents
from rwkv_core.files import whole_folder, write_json
from rwkv_core.tokenizer import named
from tasks import stage
from tasks.params import Params, load

SAMPLES = 20
"""Documents on the page, beside the longest."""


def preview() -> None:
    """outputs/data -> outputs/preview: preview.html, and metrics.json with what train.ctx_len cuts off."""
    params = load()
    cut = {side: lost(Documents(stage.DATA / side), params) for side in SIDES}
    with whole_folder(stage.PREVIEW) as out:
        write(out / "preview.html", params, "train", SAMPLES)
        write_json(out / "metrics.json", cut)
    train = cut["train"]
    print(
        f"{stage.PREVIEW / 'preview.html'} shows what is learned; train.ctx_len = {params.train.ctx_len} cuts "
        f"{train['documents_cut']} documents off, {train['tokens_cut']} tokens"
    )


def write(path: Path, params: Params, side: str, samples: int) -> None:
    """Write the page of one side of outputs/data."""
    page.write(
        path,
        Documents(stage.DATA / side),
        named(params.data.tokenizer, params.data.special_tokens),
        side=side,
        ctx_len=params.train.ctx_len,
        rows=params.train.rows,
        after_state=params.adapter.state != "none",
        samples=samples,
        manifest=json.loads(stage.MANIFEST.read_text(encoding="utf-8")),
        findings=page.read_findings(stage.DATA / "lints.csv"),
    )


def lost(documents: Documents, params: Params) -> dict[str, int]:
    """What is beyond ctx_len of rows that are one document each; nothing, where rows are made otherwise."""
    limit = page.most_read(params.train.rows, params.train.ctx_len, params.adapter.state != "none")
    return dict(zip(("documents_cut", "tokens_cut"), page.beyond(documents, limit), strict=True))


if __name__ == "__main__":
    stage.main(preview)
