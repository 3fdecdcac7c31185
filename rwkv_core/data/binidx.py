"""binidx: token files as the RWKV trainers read them. `.bin` is the tokens end to end, `.idx` says where documents begin.

    .idx = "MMIDIDX" and two zero bytes, u64 version 1, u8 dtype code, u64 items, u64 n, i32 sizes[items],
           i64 byte offsets[items], i64 document starts[n], n = items + 1: each item is one document. Little-endian.

Source: the Megatron-LM / gpt-neox indexed data set, as json2binidx_tool and RWKV-LM's make_data.py write it.
"""

import array
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from rwkv_core.errors import InputError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {4: np.int32, 8: np.uint16}  # json2binidx writes 4, make_data.py and this file 8
_UINT16 = 8
_PIECE = 100_000  # documents


class Writer:
    """Writes documents one by one; only their lengths stay in memory."""

    def __init__(self, prefix: Path) -> None:
        self._index_file = prefix.with_name(prefix.name + ".idx")
        self._bin: BinaryIO = prefix.with_name(prefix.name + ".bin").open("wb")
        self._sizes = array.array("i")

    def add(self, tokens: Sequence[int]) -> None:
        """Append one document, its end token included."""
        words = array.array("H", tokens)
        if sys.byteorder == "big":
            words.byteswap()
        self._bin.write(words.tobytes())
        self._sizes.append(len(words))

    def close(self) -> None:
        """Write the index. Without it the files are not a binidx."""
        self._bin.close()
        sizes = np.frombuffer(self._sizes, dtype=np.int32) if self._sizes else np.zeros(0, np.int32)
        count = len(sizes)
        with self._index_file.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, _UINT16, count, count + 1))
            sizes.astype("<i4", copy=False).tofile(file)
            offset = 0
            for start in range(0, count, _PIECE):  # in pieces: millions of documents must not cost memory here
                ends = np.cumsum(sizes[start : start + _PIECE], dtype="<i8") * 2 + offset
                np.concatenate(([offset], ends[:-1])).astype("<i8").tofile(file)
                offset = int(ends[-1])
            for start in range(0, count + 1, _PIECE):
                np.arange(start, min(start + _PIECE, count + 1), dtype="<i8").tofile(file)


class Documents:
    """A binidx, memory-mapped: len() documents, each an array of token ids."""

    def __init__(self, prefix: Path) -> None:
        """Open `prefix`.bin and `prefix`.idx.

        Raises:
            InputError: a file is missing, or they are not a binidx, or do not belong together.
        """
        index_file, bin_file = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
        try:
            index = index_file.read_bytes()
            bin_size = bin_file.stat().st_size
        except FileNotFoundError as error:
            raise InputError(str(error.filename), "a binidx is a .bin and an .idx", "run the prepare stage") from None
        if len(index) < _HEADER.size or not index.startswith(_MAGIC):
            raise InputError(str(index_file), "is not a binidx index", "make it anew from the text")
        _, version, code, items, starts = _HEADER.unpack_from(index)
        if version != 1 or code not in _DTYPES or len(index) != _HEADER.size + 12 * items + 8 * starts:
            raise InputError(
                f"{index_file}: version {version}, dtype code {code}, {items} items, {len(index)} bytes",
                f"a version 1 index of codes {sorted(_DTYPES)} with all its items is read",
                "make it anew from the text",
            )
        dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
        self.sizes: npt.NDArray[np.int32] = np.frombuffer(index, "<i4", items, _HEADER.size)
        self._ends = np.cumsum(self.sizes, dtype=np.int64)
        offsets = np.frombuffer(index, "<i8", items, _HEADER.size + 4 * items)
        if (self.sizes < 0).any() or not np.array_equal(offsets, (self._ends - self.sizes) * dtype.itemsize):
            raise InputError(
                f"{index_file}: its sizes and offsets do not fit",
                "each document must begin where the one before ends",
                "make both anew from the text",
            )
        tokens = self.tokens
        if bin_size != tokens * dtype.itemsize:
            raise InputError(
                f"{bin_file}: {bin_size} bytes",
                f"its index says {tokens * dtype.itemsize}",
                "make both anew from the text",
            )
        self._tokens = np.memmap(bin_file, dtype, "r") if tokens else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.sizes)

    def learned(self, i: int) -> npt.NDArray[np.bool_]:
        """Which tokens of document i are learned, (T,); all, where there is no mask."""
        return np.ones(int(self.sizes[i]), bool)

    def weight(self, i: int) -> float:
        """What each token of document i counts in the loss; 1, where there are no weights."""
        return 1.0

    def __getitem__(self, i: int) -> npt.NDArray[np.integer]:
        end = int(self._ends[i])
        return self._tokens[end - int(self.sizes[i]) : end]

    @property
    def tokens(self) -> int:
        """Tokens in all documents."""
        return int(self._ends[-1]) if len(self) else 0
