"""Text to score, not to train on: any source, every row whole, nothing of it masked or left out."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_core.config import PartConfig
from rwkv_core.data import source
from rwkv_core.data.binidx import Documents, Tokens, Writer
from rwkv_core.data.dialogue import read
from rwkv_core.data.source import Empty, Refused, Row, Unusable
from rwkv_core.errors import InputError
from rwkv_core.tokenizer import END, Tokenizer

_PART = PartConfig(
    name="all", files="**/*", kind="auto", columns={}, blank_lines="keep", think="as_given", mask="none", marks=None, weight=1
)  # fmt: skip


class Source(NamedTuple):
    """Documents that stand one after the other, and come from one place."""

    name: str
    first: int
    """Number of the first, from 0."""
    documents: int


def whole(path: Path, tokenizer: Tokenizer, out: Path) -> tuple[Documents, list[Source]]:
    """Every row of a file or folder as a document, all of it learned, as the binidx `out`; and from which file each comes.

    Files that are one row each are one source with the others of their folder.

    Raises:
        InputError: it can't be read, or a row can't.
    """
    writer, sources, count = Writer(out, beside=False), list[Source](), 0
    for shard in source.plan(path, [_PART]).shards:
        file = Path(shard.files[0])
        of_one_row = shard.kind.partition(".")[0] in source.WHOLE and path.is_dir()
        name, first = (str(file.parent) if of_one_row else str(file)), count
        for row in source.rows(shard, path):
            try:
                if isinstance(row, Refused):
                    raise Unusable(row.reason)
                writer.add(_tokens(row, tokenizer))
                count += 1
            except Empty:
                continue
            except Unusable as reason:
                where = f"{path}: {row.where}: {reason}"
                raise InputError(where, "every row is scored", "correct it, or leave it out") from None
        before = sources.pop() if sources and sources[-1].name == name else Source(name, first, 0)
        sources.append(before._replace(documents=count - before.first))
    writer.close()
    return Documents(out), [one for one in sources if one.documents]


def _tokens(row: Row, tokenizer: Tokenizer) -> Tokens:
    """A row, and its end.

    Raises:
        Unusable: there is nothing in it, or a token that the tokenizer does not have.
    """
    given = row.fields.get("tokens")
    if not isinstance(given, np.ndarray):
        return np.array([*tokenizer.encode(read(row.fields, _PART).text), END])
    if given.max(initial=0) >= len(tokenizer.table):
        raise Unusable(f"token {given.max()}: the tokenizer has {len(tokenizer.table)}")
    if not given.any():
        raise Empty("there are no tokens")
    return np.append(given, END)
