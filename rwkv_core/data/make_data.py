"""Text to a binidx as RWKV-LM's make_data.py and json2binidx_tool make it, for the trainers that read those.

Source: BlinkDL/RWKV-LM, RWKV-v5/make_data.py; Abel2076/json2binidx_tool, tools/preprocess_data.py.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.readers import Refused, jsonl
from rwkv_core.errors import InputError
from rwkv_core.files import whole_file
from rwkv_core.tokenizer import END, Tokenizer


class Made(NamedTuple):
    """What was written."""

    documents: int
    tokens: int


def make_data(source: Path, copies: int, out: Path, tokenizer: Tokenizer, seed: int) -> Made:
    """Write `copies` copies of the rows, each in an order of its own, as `out`.bin and .idx of uint16.

    Each row is encoded once; memory holds a number for each.

    Args:
        source: a .jsonl file of {"text": ...}; blank lines are passed over.
        copies: how many, from 1 on: the epochs that a trainer goes through in one.
        out: prefix of the files, which are written whole, in place of a binidx of that name.
        tokenizer: whose tokens are.
        seed: of the orders.

    Raises:
        InputError: a row can't be read, or its tokens are not its text; the message has file and line.
    """
    with _whole(out) as (prefix, folder):
        _encode(source, folder / "rows", "uint16", tokenizer, empty=True)
        rows, writer = Documents(folder / "rows"), Writer(prefix, beside=False)
        for copy in range(copies):
            for i in np.random.default_rng([seed, copy]).permutation(len(rows)):
                writer.add(rows[i])
        writer.close()
        made = Made(copies * len(rows), copies * rows.tokens)
    return made


def json2binidx(source: Path, out: Path, tokenizer: Tokenizer) -> Made:
    """Write the rows in order as `out`_text_document.bin and .idx of int32, as json2binidx_tool does with --append-eod.

    Args and errors as of `make_data`; a row without text is an error, as it is there.
    """
    with _whole(out.with_name(f"{out.name}_text_document")) as (prefix, _):
        _encode(source, prefix, "int32", tokenizer, empty=False)
        rows = Documents(prefix)
        made = Made(len(rows), rows.tokens)
    return made


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[tuple[Path, Path]]:
    """A prefix whose .bin and .idx become `out`'s if the block succeeds, and the folder that it is in, which vanishes."""
    bin_file, index = (out.with_name(out.name + ending) for ending in (".bin", ".idx"))
    with whole_file(bin_file) as whole_bin, whole_file(index) as whole_index:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            yield (prefix := Path(folder, "made")), Path(folder)
            prefix.with_suffix(".bin").rename(whole_bin)
            prefix.with_suffix(".idx").rename(whole_index)
        for ending in (".mask", ".weights"):  # of a former binidx, not of this one
            out.with_name(out.name + ending).unlink(missing_ok=True)


def _encode(
    source: Path, prefix: Path, dtype: Literal["uint16", "int32"], tokenizer: Tokenizer, *, empty: bool
) -> None:
    """Write the rows in order. `empty`: a row without text is a document too, of END alone."""
    writer, where = Writer(prefix, dtype, beside=False), ""
    for where, text in _texts(source):
        if not (text or empty):
            raise InputError(where, "json2binidx makes no document of a text without characters", "remove the line")
        try:
            tokens = tokenizer.encode(text)
        except InputError as error:
            raise InputError(f"{where}: {error.value}", error.rule, error.remedy) from None
        if tokenizer.decode_bytes(tokens) != text.encode():
            raise InputError(
                f"{where}: {text[:40]!r}", "its tokens are not its text", "give the tokenizer that can say it"
            )
        writer.add([*tokens, END])
    if not where:
        raise InputError(str(source), "has no rows", 'give lines of {"text": ...}')
    writer.close()


def _texts(source: Path) -> Iterator[tuple[str, str]]:
    """Where each row of a .jsonl file is, and its text."""
    if not source.is_file():
        raise InputError(str(source), 'must be a .jsonl file, one {"text": ...} a line', "correct the path")
    for row in jsonl(source, str(source), "", 0, source.stat().st_size, 1):
        if isinstance(row, Refused):
            raise InputError(row.where, row.reason, 'write one {"text": ...} a line, in UTF-8')
        text = row.fields.get("text")
        if not isinstance(text, str):
            raise InputError(row.where, 'a row is an object with a string "text"', "add it, or drop the line")
        yield row.where, text
