"""binidx: token files as the RWKV trainers read them. `.bin` is the tokens end to end, `.idx` says where documents begin.

    .idx = "MMIDIDX" and two zero bytes, u64 version 1, u8 dtype code, u64 items, u64 n, i32 sizes[items],
           i64 byte offsets[items], i64 first items[n] of the documents, and as the last of them `items`. Little-endian.

An item is a document (n = items + 1), but files of Megatron-LM that were cut into sentences have several in one.

Source: the Megatron-LM / gpt-neox indexed data set, as json2binidx_tool and RWKV-LM's make_data.py write it.

Two files of ours may stand beside; other programs pass them over:

    .mask    = a bit for each token of .bin, the lowest of a byte first: whether it is learned. The last byte's rest is 0.
    .weights = f32 for each document, little-endian: what each of its tokens counts in the loss.
"""

import array
import contextlib
import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from rwkv_core.errors import InputError
from rwkv_core.files import sha256

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating-point numbers
_WRITTEN: dict[str, tuple[int, str]] = {"uint16": (8, "H"), "int32": (4, "i")}
"""Code of the format, and of `array`. make_data.py writes uint16, json2binidx int32."""

_PIECE = 1 << 18  # numbers that are in memory at a time; eight divide it, for the mask
_SAMPLE = 16  # documents that are looked at when a file is opened
_LONGEST = 2**31 - 1

SIDES = ("train", "valid")
"""Names of the two binidx that a preparation makes."""

Tokens = npt.NDArray[np.integer[Any]]
Learned = npt.NDArray[np.bool_]


class Writer:
    """Writes documents one by one. Memory does not grow with them."""

    def __init__(self, prefix: Path, dtype: Literal["uint16", "int32"] = "uint16", *, beside: bool = True) -> None:
        """Write `prefix`.bin and .idx, in place of what is there.

        Args:
            prefix: the path without the endings.
            dtype: of a token.
            beside: write .mask and .weights too. Where not, those of a former file of this name are removed.
        """
        self._code, self._letter = _WRITTEN[dtype]
        self._dtype = np.dtype(_DTYPES[self._code])
        self._most = int(np.iinfo(self._dtype).max)
        self._documents = 0
        self._index = _path(prefix, ".idx").open("w+b")
        self._index.write(bytes(_HEADER.size))  # no index as long as there is no header
        self._tokens = _Column(_path(prefix, ".bin").open("wb"), self._dtype)
        self._sizes = _Column(self._index, np.dtype("<i4"))
        self._beside = beside
        if beside:
            self._learned = _Bits(_path(prefix, ".mask").open("wb"), np.dtype(bool))
            self._weights = _Column(_path(prefix, ".weights").open("wb"), np.dtype("<f4"))
        else:
            for ending in (".mask", ".weights"):
                _path(prefix, ending).unlink(missing_ok=True)

    def add(self, tokens: Sequence[int] | Tokens, learned: Learned | None = None, weight: float = 1.0) -> None:
        """Append one document, its end token included.

        Args:
            tokens: T of them, each in the range of the dtype and not negative.
            learned: (T,), which of them are; None: all.
            weight: what each counts in the loss, from 0 on.

        Raises:
            InputError: a token is out of range, there are too many, or the mask or the weight can't be theirs.
        """
        words = self._words(tokens)
        if learned is not None and learned.shape != words.shape:
            raise InputError(
                f"document {self._documents}: a mask of {learned.shape} for {len(words)} tokens",
                "there is a bit for each",
                "give as many",
            )
        if not 0 <= weight < np.inf:
            raise InputError(f"document {self._documents}: a weight of {weight}", "is a number from 0 on", "correct it")
        self._tokens.extend(words)
        self._sizes.append(len(words))
        self._documents += 1
        if self._beside:
            self._weights.append(weight)
            if learned is None:
                self._learned.fill(len(words))
            else:
                self._learned.extend(learned)

    def _words(self, tokens: Sequence[int] | Tokens) -> Tokens:
        if not isinstance(tokens, np.ndarray):
            try:
                found: Tokens = np.frombuffer(array.array(self._letter, tokens), self._dtype.newbyteorder("="))
            except OverflowError:
                found = np.asarray(tokens, object)
        else:
            found = tokens
        if found.dtype != self._dtype or self._letter == "i":
            low, high = (int(found.min()), int(found.max())) if found.size else (0, 0)
            if low < 0 or high > self._most:
                raise InputError(
                    f"document {self._documents}: token {low if low < 0 else high}",
                    f"{self._dtype.name} files hold 0 to {self._most}",
                    "give the tokenizer of these ids' model",
                )
        if len(found) > _LONGEST:
            raise InputError(f"a document of {len(found)} tokens", f"{_LONGEST} are the most", "cut it into parts")
        return found

    def append(self, documents: "Documents", keep: Learned | None = None) -> None:
        """Append another binidx of the same dtype, in constant memory.

        Args:
            documents: D of them, which are taken as they are.
            keep: (D,), which of them to take; None: all.

        Raises:
            InputError: it is of another dtype.
        """
        if documents.dtype != self._dtype:
            raise InputError(
                f"{documents.prefix}: {documents.dtype.name}",
                f"is joined to {self._dtype.name}",
                "make one like the other",
            )
        if keep is None:
            keep = np.ones(len(documents), bool)
        if keep.shape != (len(documents),):
            raise ValueError(f"{documents.prefix}: keep has {keep.shape} for {len(documents)} documents")
        edges = np.flatnonzero(np.diff(keep.astype(np.int8), prepend=0, append=0))
        for first, stop in edges.reshape(-1, 2).tolist():
            self._append(documents, first, stop)

    def _append(self, documents: "Documents", first: int, stop: int) -> None:
        """Append the documents `first` to `stop` - 1, in large pieces."""
        begin, end = documents.begin(first), documents.begin(stop - 1) + int(documents.sizes[stop - 1])
        for at in range(first, stop, _PIECE):
            sizes = documents.sizes[at : min(at + _PIECE, stop)]
            self._sizes.extend(sizes)
            if self._beside:
                self._weights.extend(documents.weights(at, at + len(sizes)))
        for tokens in _read(_path(documents.prefix, ".bin"), self._dtype, begin * self._dtype.itemsize, end - begin):
            self._tokens.extend(tokens)
        if self._beside and documents.has_mask:
            mask, skipped = _path(documents.prefix, ".mask"), begin % 8
            for packed in _read(mask, np.dtype("u1"), begin // 8, -(-end // 8) - begin // 8):
                bits = _unpack(packed)[skipped:]
                self._learned.extend(bits[: end - begin])
                begin, skipped = begin + len(bits), 0
        elif self._beside:
            self._learned.fill(end - begin)
        self._documents += stop - first

    def restart(self) -> None:
        """Write other documents in place of all so far. The files keep their pages till then, which spares much of the time."""
        for column, begin in ((self._sizes, _HEADER.size), *((column, 0) for column in self._columns())):
            column.restart(begin)
        self._documents = 0

    def _columns(self) -> "tuple[_Column, ...]":
        """Of files of their own."""
        return (self._tokens, *((self._learned, self._weights) if self._beside else ()))

    def close(self) -> None:
        """Write the index. Without it the files are not a binidx."""
        self._sizes.flush()
        count, offset = self._documents, 0
        for at in range(0, count, _PIECE):
            self._index.seek(_HEADER.size + 4 * at)
            sizes = np.frombuffer(self._index.read(4 * min(_PIECE, count - at)), "<i4")
            ends = np.cumsum(sizes, dtype="<i8") * self._dtype.itemsize + offset
            self._index.seek(_HEADER.size + 4 * count + 8 * at)
            self._index.write(np.concatenate(([offset], ends[:-1])).astype("<i8").data)
            offset = int(ends[-1])
        self._index.seek(_HEADER.size + 12 * count)
        for at in range(0, count + 1, _PIECE):
            self._index.write(np.arange(at, min(at + _PIECE, count + 1), dtype="<i8").data)
        self._index.truncate()
        for column in self._columns():
            column.close()
        self._index.seek(0)
        self._index.write(_HEADER.pack(_MAGIC, 1, self._code, count, count + 1))
        self._index.close()


class _Column:
    """Numbers on their way to a file, which they reach in large pieces."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file, self._buffer, self._used = file, np.empty(_PIECE, dtype), 0

    def append(self, value: float) -> None:
        if self._used == _PIECE:
            self.flush()
        self._buffer[self._used] = value
        self._used += 1

    def extend(self, values: npt.NDArray[Any]) -> None:
        at = 0
        while (left := len(values) - at) > (room := _PIECE - self._used):
            self._buffer[self._used :] = values[at : at + room]
            self._used, at = _PIECE, at + room
            self.flush()
        self._buffer[self._used : self._used + left] = values[at:] if at else values
        self._used += left

    def fill(self, count: int) -> None:
        """Append so many ones."""
        while count > (room := _PIECE - self._used):
            self._buffer[self._used :] = 1
            self._used, count = _PIECE, count - room
            self.flush()
        self._buffer[self._used : self._used + count] = 1
        self._used += count

    def flush(self) -> None:
        self._file.write(self._encoded(self._buffer[: self._used]).data)
        self._used = 0

    def _encoded(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values

    def restart(self, begin: int) -> None:
        self._file.seek(begin)
        self._used = 0

    def close(self) -> None:
        self.flush()
        self._file.truncate()  # what was before a restart may have been longer
        self._file.close()


class _Bits(_Column):
    """Of booleans, eight a byte: all pieces but the last are of whole bytes."""

    def _encoded(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.packbits(values, bitorder="little")


class Documents:
    """A binidx and what stands beside it, memory-mapped: len() documents, each an array of token ids.

    A document's place is checked when it is read, so a file of any size opens at once; `check` looks at everything. Only files
    with several items a document are gone through, for the documents' sizes.
    """

    sizes: Tokens
    """Tokens of each document, (D,)."""

    def __init__(self, prefix: Path) -> None:
        """Open `prefix`.bin and .idx, and .mask and .weights where they are.

        Raises:
            InputError: a file is missing, or they are not a binidx, or do not belong together.
        """
        self.prefix = prefix
        self._index, bin_file = _path(prefix, ".idx"), _path(prefix, ".bin")
        try:
            with self._index.open("rb") as file:
                header = file.read(_HEADER.size)
            index_bytes, self._bytes = self._index.stat().st_size, bin_file.stat().st_size
        except FileNotFoundError as error:
            raise InputError(str(error.filename), "a binidx is a .bin and an .idx", "run the prepare stage") from None
        except IsADirectoryError:
            raise InputError(str(self._index), "is a folder", "give the path of a binidx without its ending") from None
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise InputError(str(self._index), "is not a binidx index", "make it anew from the text")
        _, version, code, self._items, n = _HEADER.unpack(header)
        if code in (6, 7):
            raise InputError(f"{self._index}: dtype code {code}", "is of floating-point numbers", "tokens are integers")
        if version != 1 or code not in _DTYPES or n < 1 or index_bytes != _HEADER.size + 12 * self._items + 8 * n:
            raise InputError(
                f"{self._index}: version {version}, dtype code {code}, {self._items} items, {index_bytes} bytes",
                f"a version 1 index of codes {sorted(_DTYPES)} with all its items is read",
                "make it anew from the text",
            )
        self.dtype: np.dtype[Any] = np.dtype(_DTYPES[code])
        if self._bytes % self.dtype.itemsize:
            raise self._wrong_bin()
        self.tokens: int = self._bytes // self.dtype.itemsize
        """Tokens in all documents."""
        self._offsets = _map(self._index, "<i8", _HEADER.size + 4 * self._items, self._items)
        self._firsts = _map(self._index, "<i8", _HEADER.size + 12 * self._items, n)
        self._single = n == self._items + 1  # each document is one item
        if self._single:
            self.sizes = _map(self._index, "<i4", _HEADER.size, self._items)
            self._check_ends()
        else:
            self.sizes = self._merged()
        self._tokens = _map(bin_file, self.dtype, 0, self.tokens)
        self._mask = self._open_beside(".mask", "<u1", -(-self.tokens // 8))
        self._weights = self._open_beside(".weights", "<f4", len(self))
        for i in np.unique(np.linspace(0, len(self) - 1, _SAMPLE).astype(np.int64)) if len(self) else ():
            self.begin(int(i))

        self._files = {
            path: (stat.st_ino, stat.st_size)
            for path in (self._index, bin_file, _path(prefix, ".mask"), _path(prefix, ".weights"))
            if path.exists() and (stat := path.stat())
        }

    def check_there(self) -> None:
        """See that the files are as long as when they were opened: a look behind the end of a mapped one kills the process.

        One that was replaced or removed is still there for who has it open.

        Raises:
            InputError: one is shorter.
        """
        for path, (inode, size) in self._files.items():
            with contextlib.suppress(FileNotFoundError):
                now = path.stat()
                if now.st_ino == inode and now.st_size < size:
                    raise InputError(
                        f"{path}: {now.st_size} bytes",
                        f"it had {size} when it was opened, and something cut it off while it was read",
                        "run the prepare stage again",
                    )

    @property
    def has_mask(self) -> bool:
        """Whether a file says which tokens are learned."""
        return self._mask is not None

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, i: int) -> Tokens:
        begin = self.begin(i)
        return self._tokens[begin : begin + int(self.sizes[i])]

    def digest(self) -> str:
        """SHA-256 of the documents and their masks, in hexadecimal; what they count in a loss is not part of it."""
        files = [_path(self.prefix, ending) for ending in (".idx", ".bin", ".mask")]
        found = "".join(f"{file.suffix} {sha256(file)}\n" for file in files if file.exists())
        return hashlib.sha256(found.encode()).hexdigest()

    def learned(self, i: int) -> Learned:
        """Which tokens of document i are learned, (T,); all, where there is no mask."""
        begin, size = self.begin(i), int(self.sizes[i])
        if self._mask is None:
            return np.ones(size, bool)
        return _unpack(self._mask[begin // 8 : -(-(begin + size) // 8)])[begin % 8 : begin % 8 + size]

    def weight(self, i: int) -> float:
        """What each token of document i counts in the loss; 1, where there are no weights."""
        if self._weights is None:
            return 1.0
        weight = float(self._weights[i])
        if not 0 <= weight < np.inf:
            raise self._wrong_weight(range(len(self))[i], weight)
        return weight

    def weights(self, first: int, stop: int) -> npt.NDArray[np.float32]:
        """The weights of documents `first` to `stop` - 1."""
        return np.ones(stop - first, np.float32) if self._weights is None else self._weights[first:stop]

    def begin(self, i: int) -> int:
        """The first token's number of document i in all of .bin.

        Raises:
            InputError: its size does not fit its place.
        """
        i = range(len(self))[i]
        item = int(self._firsts[i]) if not self._single else i
        begin = self._offset(item)
        end = self._offset(item + 1) if self._single else begin + int(self.sizes[i]) * self.dtype.itemsize
        size = end - begin
        if (
            not 0 <= begin <= end <= self._bytes
            or begin % self.dtype.itemsize
            or size != int(self.sizes[i]) * self.dtype.itemsize
        ):
            raise self._unfit(i)
        return begin // self.dtype.itemsize

    def check(self) -> None:
        """Look at everything that a damaged file could have wrong, in constant memory; seconds for a file of gigabytes.

        What no check can know are other tokens, bits and weights that could have been.

        Raises:
            InputError: names the file, and the document.
        """
        end, width = 0, self.dtype.itemsize
        sizes = _read(self._index, np.dtype("<i4"), _HEADER.size, self._items)
        offsets = _read(self._index, np.dtype("<i8"), _HEADER.size + 4 * self._items, self._items)
        at = 0
        for some_sizes, some_offsets in zip(sizes, offsets, strict=True):
            ends = np.cumsum(some_sizes, dtype=np.int64) * width + end
            wrong = (some_sizes < 0) | (some_offsets != ends - some_sizes.astype(np.int64) * width)
            if wrong.any():
                item = at + int(np.argmax(wrong))
                i = item if self._single else int(np.searchsorted(self._firsts, item, side="right")) - 1
                self.begin(max(i - 1, 0))  # of a place that is not where the document before ends, that one is named
                raise self._unfit(i)
            at, end = at + len(ends), int(ends[-1])
        if end != self._bytes:
            raise self._wrong_bin(end)
        if self._single:
            at = 0
            for firsts in _read(self._index, np.dtype("<i8"), _HEADER.size + 12 * self._items, self._items + 1):
                wrong = firsts != np.arange(at, at + len(firsts))
                if wrong.any():
                    raise self._misplaced(at + int(np.argmax(wrong)))
                at += len(firsts)
        if self.dtype.kind == "i":
            at = 0
            for tokens in _read(_path(self.prefix, ".bin"), self.dtype, 0, self.tokens):
                if (tokens < 0).any():
                    i = at + int(np.argmax(tokens < 0))
                    raise InputError(
                        f"{_path(self.prefix, '.bin')}: token {int(tokens[i - at])} at {i}",
                        "tokens are not negative",
                        "make both anew from the text",
                    )
                at += len(tokens)
        if self._mask is not None and self.tokens % 8 and int(self._mask[-1]) >> self.tokens % 8:
            raise InputError(
                f"{_path(self.prefix, '.mask')}: a bit is set after the last token's",
                "the mask must be of these tokens",
                "run the prepare stage again",
            )
        if self._weights is not None:
            at = 0
            for weights in _read(_path(self.prefix, ".weights"), np.dtype("<f4"), 0, len(self)):
                wrong = ~((weights >= 0) & (weights < np.inf))
                if wrong.any():
                    raise self._wrong_weight(at + int(np.argmax(wrong)), float(weights[np.argmax(wrong)]))
                at += len(weights)

    def _offset(self, item: int) -> int:
        """Where an item begins in .bin, in bytes; the one after the last, where .bin ends."""
        return int(self._offsets[item]) if item < self._items else self._bytes

    def _check_ends(self) -> None:
        """The first document begins where .bin does, and the last ends where it ends."""
        if self._firsts[0] != 0 or self._firsts[-1] != self._items:
            raise self._misplaced(0 if self._firsts[0] != 0 else self._items)
        if not self._items:
            if self._bytes:
                raise self._wrong_bin(0)
            return
        if self._offsets[0] != 0:
            raise self._unfit(0)
        says = int(self._offsets[-1]) + int(self.sizes[-1]) * self.dtype.itemsize
        if says != self._bytes:
            raise self._wrong_bin(says)

    def _merged(self) -> npt.NDArray[np.int64]:
        """The sizes of documents of several items, each."""
        firsts = np.asarray(self._firsts)
        wrong = np.diff(firsts) < 0
        if firsts[0] != 0 or firsts[-1] != self._items or wrong.any():
            raise self._misplaced(int(np.argmax(wrong)) + 1 if wrong.any() else 0)
        begins = np.full(len(firsts), self._bytes, np.int64)
        inside = firsts < self._items
        begins[inside] = self._offsets[firsts[inside]]
        sizes, rest = np.divmod(np.diff(begins), self.dtype.itemsize)
        if begins[0] != 0 or (sizes < 0).any() or rest.any():
            raise self._unfit(int(np.argmax((sizes < 0) | (rest != 0))) if len(sizes) else 0)
        return sizes

    def _open_beside(self, ending: str, dtype: str, count: int) -> npt.NDArray[Any] | None:
        file = _path(self.prefix, ending)
        if not file.exists():
            return None
        needs = count * np.dtype(dtype).itemsize
        if file.stat().st_size != needs:
            raise InputError(
                f"{file}: {file.stat().st_size} bytes",
                f"{needs} are for these documents",
                "run the prepare stage again, or remove it",
            )
        return _map(file, dtype, 0, count)

    def _unfit(self, i: int) -> InputError:
        return InputError(
            f"{self._index}: document {i}: its size and offset do not fit",
            "each document must begin where the one before ends",
            "make both anew from the text",
        )

    def _misplaced(self, place: int) -> InputError:
        return InputError(
            f"{self._index}: document {place} begins with item {int(self._firsts[place])}",
            f"{self._items} items of {len(self)} documents must be theirs in order, and a document of no items is none",
            "make both anew from the text",
        )

    def _wrong_bin(self, says: int | None = None) -> InputError:
        rule = (
            f"its index says {says}" if says is not None else f"its index says that a token has {self.dtype.itemsize}"
        )
        return InputError(f"{_path(self.prefix, '.bin')}: {self._bytes} bytes", rule, "make both anew from the text")

    def _wrong_weight(self, i: int, weight: float) -> InputError:
        return InputError(
            f"{_path(self.prefix, '.weights')}: document {i}: {weight}",
            "a weight is a number from 0 on",
            "run the prepare stage again",
        )


def _path(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)  # not with_suffix: a name may have dots


def _map(file: Path, dtype: str | np.dtype[Any], offset: int, count: int) -> npt.NDArray[Any]:
    """Part of a file as an array that is read where it is looked at."""
    if not count:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, "r", offset, (count,)).view(np.ndarray)  # a memmap's own slices are slow to make


def _read(file: Path, dtype: np.dtype[Any], offset: int, count: int) -> Iterator[npt.NDArray[Any]]:
    """Part of a file in pieces. Read, not mapped: mapped pages that were looked at count as this process's memory."""
    with file.open("rb") as opened:
        opened.seek(offset)
        for at in range(0, count, _PIECE):
            yield np.frombuffer(opened.read(min(_PIECE, count - at) * dtype.itemsize), dtype)


def _unpack(packed: npt.NDArray[np.uint8]) -> Learned:
    return np.unpackbits(packed, bitorder="little").view(np.bool_)
