"""Text to a binidx as RWKV-LM's make_data.py and json2binidx_tool make it, for the trainers that read those.

Source: BlinkDL/RWKV-LM, RWKV-v5/make_data.py; Abel2076/json2binidx_tool, tools/preprocess_data.py.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from rwkv_core.data.binidx import Documents, Writer
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
    writer, number = Writer(prefix, dtype, beside=False), 0
    for number, text in _texts(source):
        where = f"{source}:{number}"
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
    if not number:
        raise InputError(str(source), "has no rows", 'give lines of {"text": ...}')
    writer.close()


def _texts(source: Path) -> Iterator[tuple[int, str]]:
    """The texts of a .jsonl file, and their lines' numbers."""
    if not source.is_file():
        raise InputError(str(source), 'must be a .jsonl file, one {"text": ...} a line', "correct the path")
    with source.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{source}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                row = json.loads(line.rstrip())
                text = row["text"]
                text.encode()
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: {error.reason}", "the file must be UTF-8", "convert it to UTF-8") from None
            except UnicodeEncodeError:
                raise InputError(where, "half of a surrogate pair is no character", "write the whole pair") from None
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{where}:{error.colno}", f"is not JSON ({error.msg})", "write one JSON object a line"
                ) from None
            except (KeyError, TypeError, AttributeError):
                raise InputError(where, 'a row is an object with a string "text"', "add it, or drop the line") from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
                raise InputError(where, f"can't be read ({error})", "write one flat JSON object a line") from None
            yield number, text
