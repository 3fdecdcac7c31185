"""Text to tokens: one pass over the source writes the training and the held-out documents."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from rwkv_core.config import PartConfig
from rwkv_core.data.binidx import Writer
from rwkv_core.data.source import Refused, plan, rows
from rwkv_core.errors import InputError
from rwkv_core.files import write_json
from rwkv_core.tokenizer import END, Tokenizer

SIDES = ("train", "valid")

_JSONL = PartConfig(
    name="all",
    files="*",
    kind="jsonl",
    columns={},
    blank_lines="keep",
    think="as_given",
    mask="none",
    marks=None,
    weight=1,
)


def held_out(group: str, fraction: float) -> bool:
    """Whether rows of `group` are kept from training: it depends on the name alone, not on the rows around it."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) < fraction * 2**64


def prepare(source: Path, fraction: float, group: str | None, tokenizer: Tokenizer, out: Path) -> dict[str, Any]:
    """Tokenize `source` into `out`/train.bin, .idx and `out`/valid.bin, .idx. Memory does not grow with the text.

    Each document ends with token 0. Rows whose text is empty are dropped and counted, so the counts add up.

    Args:
        source: a .jsonl file.
        fraction: share of the groups to hold out.
        group: field of a row that names its group; a row without it is a group of its own, named by its text.
        tokenizer: of the model to train.
        out: an existing folder.

    Returns:
        The manifest: source, vocabulary and split, and for each side documents, tokens, bytes, longest document and a
        histogram of lengths (documents by the power of two that their tokens do not exceed).

    Raises:
        InputError: a row can't be read or has no text (see `source.rows`), or a side would be empty.
    """
    found = plan(source, [_JSONL])
    writers = {side: Writer(out / side) for side in SIDES}
    sides = {side: {"documents": 0, "tokens": 0, "bytes": 0, "longest": 0} for side in SIDES}
    lengths: dict[str, Counter[int]] = {side: Counter() for side in SIDES}
    dropped = ungrouped = total = 0
    for row in itertools.chain.from_iterable(rows(shard, source) for shard in found.shards):
        if isinstance(row, Refused):
            raise InputError(row.where, row.reason, "correct it, or drop the line")
        text = row.fields.get("text")
        if not isinstance(text, str):
            fields = ", ".join(map(repr, row.fields)) or "none"
            raise InputError(
                f"{row.where}: fields {fields}", 'a row is an object with a string "text"', "add it, or drop the line"
            )
        total += 1
        if not text:
            dropped += 1
            continue
        value = row.fields.get(group) if group is not None else None
        ungrouped += value is None
        side = SIDES[held_out(text if value is None else str(value), fraction)]
        tokens = [*tokenizer.encode(text), END]
        writers[side].add(tokens)
        count = sides[side]
        count["documents"] += 1
        count["tokens"] += len(tokens)
        count["bytes"] += len(text.encode())
        count["longest"] = max(count["longest"], len(tokens))
        lengths[side][1 << (len(tokens) - 1).bit_length()] += 1
    for writer in writers.values():
        writer.close()
    if total == dropped:
        raise InputError(f"{source}: {total} rows", "none has any text", "give it rows with text")
    for side, count in sides.items():
        if not count["documents"]:
            raise InputError(
                f"{source}: {total - dropped} rows, none of them on the {side} side",
                f"data.holdout.fraction = {fraction} must leave documents on both sides",
                "change the fraction, or the group, or give more rows",
            )
    manifest = {
        "source": {"path": str(source), "sha256": found.sha256, "rows": total, "dropped_empty": dropped},
        "vocabulary": {"sha256": tokenizer.digest, "size": len(tokenizer.table)},
        "holdout": {"fraction": fraction, "group": group, "rows_without_group": ungrouped},
        **{side: sides[side] | {"lengths": dict(sorted(lengths[side].items()))} for side in SIDES},
    }
    write_json(out / "manifest.json", manifest)
    return manifest
