"""The shards as one: what they hold end to end, and what can be told only of all: refused rows, duplicates, leaks."""

import csv
import functools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rwkv_core.config import DataConfig
from rwkv_core.data import near
from rwkv_core.data.binidx import SIDES, Documents, Tokens, Writer
from rwkv_core.data.mask import byte_lengths
from rwkv_core.data.source import Plan
from rwkv_core.errors import InputError
from rwkv_core.files import write_json
from rwkv_core.tokenizer import Tokenizer


def beside(prefix: Path, what: str) -> Path:
    """File of a shard's side that is needed until the shards are one: keys, near, where."""
    return prefix.with_name(f"{prefix.name}.{what}.{'json' if what == 'where' else 'npy'}")


def join(data: DataConfig, plan: Plan, tokenizer: Tokenizer, made: Iterable[Path], out: Path) -> dict[str, Any]:
    """The shards as one, and what there is to tell about them.

    Args:
        data: the settings they were made with.
        plan: the source.
        tokenizer: what its tokens are.
        made: their folders, in the source's order. Each is joined when it comes, while others are still made; what leaks is
            known only of all, and if some is dropped the training side is joined again.
        out: folder to write into.
    """
    writers, folders = {side: Writer(out / side) for side in SIDES}, list[Path]()
    for folder in made:
        folders.append(folder)
        for side in SIDES:
            writers[side].append(Documents(folder / side))
    facts = [json.loads((folder / "facts.json").read_text(encoding="utf-8")) for folder in folders]
    total = {
        name: sum(fact[name] for fact in facts) for name in ("rows", "refused", "empty", "ungrouped", "straddling")
    }
    lints = sum((Counter(fact["lints"]) for fact in facts), Counter[str]())
    _join_text(out / "refused.jsonl", "", [folder / "refused.jsonl" for folder in folders])
    _join_text(out / "lints.csv", "code,where,character,message\n", [folder / "lints.csv" for folder in folders])
    _check_refused(data, total["rows"], total["refused"], out / "refused.jsonl")
    if total["rows"] == total["refused"] + total["empty"]:
        raise InputError(f"{data.source}: {total['rows']} rows", "none has any text", "give it rows with text")

    leaks, drops = 0, data.holdout.leaks == "drop"
    with (out / "lints.csv").open("a", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        lints["duplicate"] = _tell_duplicates(folders, table)
        if data.holdout.near_duplicates is not None:
            leaking = _tell_leaks(folders, data.holdout.near_duplicates, table)
            leaks = lints["leak"] = sum(int(np.count_nonzero(leaky)) for leaky in leaking)
            if leaks and drops:
                writers["train"].restart()
                for fact, folder, leaky in zip(facts, folders, leaking, strict=True):
                    documents = Documents(folder / "train")
                    writers["train"].append(documents, ~leaky)
                    _take_away(fact["train"], documents, ~leaky, tokenizer)
    sides = {}
    for side in SIDES:
        sides[side] = _side_facts(side, data, facts)
        if not sides[side]["documents"]:
            raise InputError(
                f"{data.source}: {total['rows'] - total['refused'] - total['empty']} rows, none of them on the {side} side",
                f"data.holdout.fraction = {data.holdout.fraction} must leave documents on both sides",
                "change the fraction, or the group, or give more rows",
            )
        writers[side].close()
    _write_tables(out, plan, data, sides)
    manifest = {
        "source": {
            "path": str(data.source),
            "sha256": plan.sha256,
            "files": len(plan.files),
            "files_not_read": plan.unread,
            "rows": total["rows"],
            "refused": total["refused"],
            "dropped_empty": total["empty"],
        },
        "vocabulary": {"sha256": tokenizer.digest, "size": len(tokenizer.table)},
        "holdout": {
            "fraction": data.holdout.fraction,
            "group": data.holdout.group,
            "rows_without_group": total["ungrouped"],
            "leaks": leaks,
            "leaks_dropped": leaks if drops else 0,
        },
        "straddling_tokens": total["straddling"],
        "lints": {code: count for code, count in sorted(lints.items()) if count},
        **sides,
    }
    write_json(out / "manifest.json", manifest)
    write_json(out / "metrics.json", _metrics(manifest))
    return manifest


def _metrics(manifest: dict[str, Any]) -> dict[str, Any]:
    source, holdout = manifest["source"], manifest["holdout"]
    counts = ("documents", "tokens", "learned", "bytes", "longest")
    return {
        "rows": source["rows"],
        "refused": source["refused"],
        "dropped": source["dropped_empty"],
        "leaks": holdout["leaks"],
        "leaks_dropped": holdout["leaks_dropped"],
        "lints": sum(manifest["lints"].values()),
        **{side: {name: manifest[side][name] for name in counts} for side in SIDES},
    }


def _join_text(out: Path, header: str, pieces: Sequence[Path]) -> None:
    with out.open("wb") as file:
        file.write(header.encode())
        for piece in pieces:
            with piece.open("rb") as read_from:
                shutil.copyfileobj(read_from, file, 1 << 20)


def _check_refused(data: DataConfig, rows: int, refused: int, listed: Path) -> None:
    if refused > data.refused * rows:
        with listed.open(encoding="utf-8") as file:
            lines = (json.loads(line) for line in file)
            told = [f"{line['where']}: {line['reason']}" for line in lines if not line["empty"]][:5]
        raise InputError(
            f"{data.source}: {refused} of {rows} rows can't be used, first {'; '.join(told)}",
            f"data.refused = {data.refused:g} lets at most {int(data.refused * rows)} be left out",
            "correct them, or let more be refused",
        )


def _tell_duplicates(folders: Sequence[Path], table: Any) -> int:
    """Documents that are in the source before, word for word: how many."""
    places = [(folder, side) for folder in folders for side in SIDES]
    keys = [np.load(beside(folder / side, "keys")) for folder, side in places]
    starts = np.cumsum([0, *map(len, keys)])
    _, first, which = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(starts[-1]))
    names = _Names(places)
    for i in again:
        at, before = (int(np.searchsorted(starts, j, "right")) - 1 for j in (i, first[which[i]]))
        origin = names.get(before, int(first[which[i]] - starts[before]))
        table.writerow(("duplicate", names.get(at, int(i - starts[at])), 1, f"the same as {origin}"))
    return len(again)


def _tell_leaks(folders: Sequence[Path], similarity: float, table: Any) -> list[npt.NDArray[np.bool_]]:
    """Of each shard's training documents, which are nearly one that is held out."""
    signatures = [np.load(beside(folder / "valid", "near")) for folder in folders]
    starts = np.cumsum([0, *map(len, signatures)])
    index = near.Index(np.concatenate(signatures))
    del signatures
    names, held_names = (_Names([(folder, side) for folder in folders]) for side in SIDES)
    opened = functools.lru_cache(maxsize=16)(lambda shard: Documents(folders[shard] / "valid"))

    def place(document: int) -> tuple[int, int]:
        shard = int(np.searchsorted(starts, document, "right")) - 1
        return shard, document - int(starts[shard])

    def held_out_tokens(document: int) -> Tokens:
        shard, i = place(document)
        return opened(shard)[i][:-1]

    leaking = []
    for shard, folder in enumerate(folders):
        documents = Documents(folder / "train")
        leaky = np.zeros(len(documents), bool)
        near_them = np.load(beside(folder / "train", "near"))
        for i in np.flatnonzero(index.agrees(near_them)).tolist():
            found = index.nearest(documents[i][:-1], near_them[i], held_out_tokens, similarity)
            if found is not None:
                leaky[i] = True
                of = held_names.get(*place(found[0]))
                table.writerow(("leak", names.get(shard, i), 1, f"{of} is held out, and {found[1]:.0%} the same"))
        leaking.append(leaky)
    return leaking


class _Names:
    """Where the documents of shards stand in the source; the last shards asked for are in memory."""

    def __init__(self, places: Sequence[tuple[Path, str]]) -> None:
        self._places = places
        self._read = functools.lru_cache(maxsize=4)(self._load)

    def get(self, place: int, document: int) -> str:
        return self._read(place)[document]

    def _load(self, place: int) -> list[str]:
        folder, side = self._places[place]
        names: list[str] = json.loads(beside(folder / side, "where").read_text(encoding="utf-8"))
        return names


def _take_away(facts: dict[str, Any], documents: Documents, kept: npt.NDArray[np.bool_], tokenizer: Tokenizer) -> None:
    """Leave the documents that are not kept out of a shard's facts."""
    if kept.all():
        return
    widths = byte_lengths(tokenizer)
    for i in np.flatnonzero(~kept):
        tokens = documents[int(i)]
        facts["documents"] -= 1
        facts["tokens"] -= len(tokens)
        facts["learned"] -= int(np.count_nonzero(documents.learned(int(i))))
        facts["bytes"] -= int(widths[tokens].sum())
        facts["lengths"][str(1 << (len(tokens) - 1).bit_length())] -= 1
    facts["longest"] = int(documents.sizes[kept].max(initial=0))


def _side_facts(side: str, data: DataConfig, facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A side's counts over all shards, and where in it each part begins: shards are in the order of the parts."""
    found = {name: sum(fact[side][name] for fact in facts) for name in ("documents", "tokens", "learned", "bytes")}
    lengths = sum((Counter({int(most): n for most, n in fact[side]["lengths"].items()}) for fact in facts), Counter())
    parts, first = [], 0
    for part in data.parts:
        mine = [fact[side] for fact in facts if fact["part"] == part.name]
        counts = {name: sum(fact[name] for fact in mine) for name in ("documents", "tokens", "learned")}
        parts.append({"name": part.name, "first": first, **counts})
        first += counts["documents"]
    longest = max((fact[side]["longest"] for fact in facts), default=0)
    return {**found, "longest": longest, "lengths": dict(sorted(lengths.items())), "parts": parts}


def _write_tables(out: Path, plan: Plan, data: DataConfig, sides: dict[str, Any]) -> None:
    with (out / "lengths.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["tokens_up_to", "documents", "side"])
        table.writerows((most, n, side) for side in SIDES for most, n in sides[side]["lengths"].items())
    with (out / "files.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "part", "kind", "bytes", "sha256"])
        table.writerows((f.path, data.parts[f.part].name, f.kind, f.bytes, f.sha256) for f in plan.files)
