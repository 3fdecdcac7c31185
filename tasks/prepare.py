"""prepare: the source text becomes token files, a held-out part kept apart."""

import csv
from typing import Any

from rwkv_core.data.prepare import SIDES
from rwkv_core.data.prepare import prepare as prepare_data
from rwkv_core.files import whole_folder, write_json
from rwkv_core.tokenizer import named
from tasks import stage
from tasks.params import load


def prepare() -> None:
    """data.source -> outputs/data: train and valid .bin and .idx, manifest.json, metrics.json, lengths.csv."""
    params = load()
    data = params.data
    with whole_folder(stage.DATA) as out:
        tokenizer = named(data.tokenizer, data.special_tokens)
        manifest = prepare_data(data.source, data.holdout.fraction, data.holdout.group, tokenizer, out)
        write_json(out / "metrics.json", _metrics(manifest))
        with (out / "lengths.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["tokens_up_to", "documents", "side"])
            table.writerows((most, n, side) for side in SIDES for most, n in manifest[side]["lengths"].items())
    counts = ", ".join(f"{manifest[s]['documents']} documents of {manifest[s]['tokens']} tokens in {s}" for s in SIDES)
    print(
        f"prepared {manifest['source']['rows']} rows: {counts}; {manifest['source']['dropped_empty']} empty rows dropped"
    )


def _metrics(manifest: dict[str, Any]) -> dict[str, Any]:
    sides = {
        side: {name: manifest[side][name] for name in ("documents", "tokens", "bytes", "longest")} for side in SIDES
    }
    return {"rows": manifest["source"]["rows"], "dropped": manifest["source"]["dropped_empty"], "truncated": 0, **sides}


if __name__ == "__main__":
    stage.main(prepare)
