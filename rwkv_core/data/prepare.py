"""Rows in, token files out: shard by shard, in as many processes as there are, with the same bytes however many.

A shard is a piece of the source that one process reads by itself. What is made of it stays in a folder of its own until all are
done, so that an interrupted preparation goes on with the shards that it lacks. They are joined in the source's order.
"""

import contextlib
import csv
import functools
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from rwkv_core.config import DataConfig, PartConfig
from rwkv_core.data import near, source
from rwkv_core.data.binidx import SIDES, Tokens, Writer
from rwkv_core.data.dialogue import Text, read, spans
from rwkv_core.data.join import beside, join
from rwkv_core.data.lint import Finding, lint
from rwkv_core.data.mask import learned_tokens
from rwkv_core.data.source import Empty, Refused, Row, Shard, Unusable
from rwkv_core.errors import InputError
from rwkv_core.files import sha256, whole_folder, write_json
from rwkv_core.tokenizer import END, Tokenizer, named

Pool = Callable[[int], AbstractContextManager[Executor]]
"""Gives, for so many shards or fewer, what runs them."""

_TOGETHER = 64  # documents whose signatures are made at a time

_WEEK = 7 * 86400.0
"""Seconds after which shards that nobody came back for are removed."""


def held_out(digest: bytes, fraction: float) -> bool:
    """Whether a group is kept from training, by the SHA-256 of its name alone: not by the rows around it."""
    return int.from_bytes(digest[:8]) < fraction * 2**64


def prepare(
    data: DataConfig,
    out: Path,
    work: Path,
    pool: Pool | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    shard_bytes: int = source.SHARD_BYTES,
) -> dict[str, Any]:
    """Tokenize `data.source` into a binidx of each side, with masks and weights. Memory does not grow with the text.

    Each document ends with token 0. Every row is learned, held out, left out as a leak, or in refused.jsonl: the counts add up.

    Args:
        data: what to read, and how.
        out: becomes a folder of train and valid .bin, .idx, .mask and .weights, refused.jsonl, lints.csv, files.csv,
            lengths.csv, manifest.json and metrics.json.
        work: folder of finished shards; those of a finished preparation are removed.
        pool: of processes that see the same files; it is not asked for a single shard. None: this process does all.
        progress: is told how many shards are done, and how many there are.
        shard_bytes: of the source, in a shard.

    Returns:
        The manifest: source, vocabulary, split, and for each side documents, tokens, those learned, bytes, longest document,
        a histogram of lengths (documents by the power of two that their tokens do not exceed) and where each part begins.

    Raises:
        InputError: the source can't be read, more rows are refused than may be, or a side would be empty.
    """
    work.mkdir(parents=True, exist_ok=True)
    most = source.most_shards(data.source, shard_bytes)
    with (
        contextlib.nullcontext() if pool is None or most < 2 else pool(most) as executor
    ):  # it begins while this one reads
        plan = source.plan(data.source, data.parts, shard_bytes=shard_bytes)
        tokenizer = named(data.tokenizer, data.special_tokens)
        digest = hashlib.sha256(f"{_settings_digest(data, tokenizer)} {plan.sha256}".encode()).hexdigest()[:16]
        with FileLock(work / f"{digest}.lock"):
            folders = [work / digest / shard.digest for shard in plan.shards]
            with whole_folder(out) as whole:
                made = _made(data, plan.shards, folders, executor, progress)
                manifest = join(data, plan, tokenizer, made, whole)
            shutil.rmtree(work / digest)
    _sweep(work)
    return manifest


def ready(tokenizer: str, special: Mapping[str, int]) -> None:
    """Load what a shard needs beside its text: for `processes.pool`. World's encoder is loaded by the first text."""
    named(tokenizer, special).encode("")


def _settings_digest(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Of all that shapes a shard beside the source; the code too, lest shards of two versions are joined."""
    shaping = data.model_dump(mode="json", include={"parts", "tokenizer", "special_tokens", "holdout"})
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join([json.dumps(shaping).encode(), tokenizer.digest.encode(), *code])).hexdigest()


def _sweep(work: Path) -> None:
    for left in work.iterdir():
        if left.stat().st_mtime < time.time() - _WEEK:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _made(
    data: DataConfig,
    shards: Sequence[Shard],
    folders: Sequence[Path],
    executor: Executor | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Path]:
    """The shards' folders, in the source's order, each when it is there. So of several faults the source's first is told."""
    todo = {folder: shard for shard, folder in zip(shards, folders, strict=True) if not _is_whole(folder)}
    done = len(shards) - len(todo)
    task = functools.partial(_shard, data.model_copy(update={"source": data.source.absolute()}))
    futures = {}
    if executor is not None:
        futures = {folder: executor.submit(task, shard, folder.absolute()) for folder, shard in todo.items()}
    for folder in folders:
        if folder in todo:
            if executor is not None:
                futures[folder].result()
            else:
                task(todo[folder], folder)
            done += 1
            if progress is not None:
                progress(done, len(shards))
        yield folder


class _Side:
    """What of a shard goes to one side."""

    def __init__(self, folder: Path, side: str, data: DataConfig) -> None:
        self.writer = Writer(folder / side)
        self.facts: dict[str, int] = {"documents": 0, "tokens": 0, "learned": 0, "bytes": 0, "longest": 0}
        self.lengths: Counter[int] = Counter()
        self.keys = list[bytes]()
        self.signatures = list[npt.NDArray[np.uint16]]()
        self.waiting = list[Tokens]()
        self.where = list[str]()
        self._near = data.holdout.near_duplicates is not None
        self._prefix = folder / side

    def add(self, document: "_Document", key: bytes, where: str) -> None:
        tokens, facts = document.tokens, self.facts
        count = len(tokens)
        self.writer.add(tokens, document.learned, document.weight)
        facts["documents"] += 1
        facts["tokens"] += count
        facts["learned"] += count if document.learned is None else int(np.count_nonzero(document.learned))
        facts["bytes"] += len(document.text)
        facts["longest"] = max(facts["longest"], count)
        self.lengths[1 << (count - 1).bit_length()] += 1
        self.keys.append(key)
        self.where.append(where)
        if self._near:
            self.waiting.append(tokens[:-1])
            if len(self.waiting) == _TOGETHER:
                self._sign()

    def _sign(self) -> None:
        self.signatures.append(near.signatures(self.waiting))
        self.waiting.clear()

    def close(self) -> dict[str, Any]:
        """Write what the joining needs beside the binidx; the facts."""
        self.writer.close()
        np.save(beside(self._prefix, "keys"), np.frombuffer(b"".join(self.keys), "<u8"))
        if self._near:
            self._sign()
            np.save(beside(self._prefix, "near"), np.concatenate(self.signatures))
        beside(self._prefix, "where").write_text(json.dumps(self.where, ensure_ascii=False), encoding="utf-8")
        return self.facts | {"lengths": self.lengths}


class _Document(NamedTuple):
    """A row, ready to be written."""

    tokens: npt.NDArray[np.uint16]
    """(T,), the end token among them."""
    learned: npt.NDArray[np.bool_] | None
    """(T,); None: all."""
    weight: float
    text: bytes
    """What it is grouped by where no field says it, and known again by."""
    straddling: int
    """Tokens in which what is learned begins or ends."""
    findings: Sequence[Finding]


def _shard(data: DataConfig, shard: Shard, folder: Path) -> None:
    """Make one shard, whole or not at all. The disk is not waited for: `_is_whole` knows what a power cut has spoiled."""
    tokenizer = named(data.tokenizer, data.special_tokens)
    part, holdout = data.parts[shard.part], data.holdout
    counts = Counter(rows=0, refused=0, empty=0, ungrouped=0, straddling=0)
    lints: Counter[str] = Counter()
    with (
        whole_folder(folder, synced=False) as out,
        (out / "refused.jsonl").open("w", encoding="utf-8") as refusals,
        (out / "lints.csv").open("w", newline="", encoding="utf-8") as findings,
    ):
        sides = {side: _Side(out, side, data) for side in SIDES}
        table = csv.writer(findings)
        for row in source.rows(shard, data.source):
            counts["rows"] += 1
            empty = False
            if not isinstance(row, Refused):
                try:
                    document = _document(row, part, tokenizer)
                except Unusable as reason:
                    empty = isinstance(reason, Empty)
                    row = Refused(row.where, str(reason), row.raw)
            if isinstance(row, Refused):
                if not empty and not data.refused:
                    raise InputError(
                        f"{row.where}: {row.reason}",
                        "data.refused = 0 lets no row be left out",
                        "correct the row, or let data.refused be above 0: such rows are then listed in refused.jsonl",
                    )
                counts["empty" if empty else "refused"] += 1
                refusals.write(_told(row, empty))
                continue
            value = row.fields.get(holdout.group) if holdout.group is not None else None
            counts["ungrouped"] += value is None
            counts["straddling"] += document.straddling
            key = digest = hashlib.sha256(document.text).digest()
            if value is not None:
                digest = hashlib.sha256(str(value).encode("utf-8", "surrogateescape")).digest()
            sides[SIDES[held_out(digest, holdout.fraction)]].add(document, key[:8], row.where)
            for finding in document.findings:
                lints[finding.code] += 1
                table.writerow((finding.code, row.where, finding.at + 1, finding.message))
        facts = {side: sides[side].close() for side in SIDES}
        refusals.close()
        findings.close()
        files = {file.name: sha256(file) for file in sorted(out.iterdir())}
        write_json(out / "facts.json", {"part": part.name, **counts, "lints": lints, **facts, "files": files})


def _is_whole(folder: Path) -> bool:
    """Whether a shard is there, as it was made."""
    try:
        files = json.loads((folder / "facts.json").read_text(encoding="utf-8"))["files"]
        return all(sha256(folder / name) == digest for name, digest in files.items())
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _document(row: Row, part: PartConfig, tokenizer: Tokenizer) -> "_Document":
    """A row in tokens.

    Raises:
        Unusable: nothing can be learned from it.
    """
    given = row.fields.get("tokens")
    if isinstance(given, np.ndarray):
        tokens = np.append(given, END).astype(np.uint16)
        most = int(given.max(initial=0))
        if most >= len(tokenizer.table):
            raise Unusable(f"token {most}: the tokenizer has {len(tokenizer.table)}")
        raw = tokenizer.decode_bytes(given.tolist())
        text = raw.decode("utf-8", "surrogateescape")
        if not text:
            raise Empty("there are no tokens")
        content = Text(text, spans(text, part), part.weight)
    else:
        content = read(row.fields, part)
        raw = content.text.encode()
        ids = [*tokenizer.encode(content.text), END]
        tokens = np.fromiter(ids, np.uint16, len(ids))
    findings = lint(content.text, tokenizer)
    learned, straddling = None, 0
    if content.learned is not None:
        learned = np.ones(len(tokens), bool)  # the end always is
        learned[:-1], straddling = learned_tokens(tokenizer, tokens[:-1], content.text, content.learned)
    return _Document(tokens, learned, content.weight, raw, straddling, findings)


def _told(refused: Refused, empty: bool) -> str:
    """A line of refused.jsonl. Bytes that are no UTF-8 stand in it as lone surrogates, so that the row can be had back."""
    line = {
        "where": refused.where,
        "reason": refused.reason,
        "empty": empty,
        "row": refused.raw.decode("utf-8", "surrogateescape"),
    }
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(line)
    return f"{text}\n"
