"""Text to tokens and back: RWKV World's vocabulary, that of the older Pile models, and plain bytes.

In each, 0 marks the end of a document and has no bytes. A table of the bytes of every id decodes, and counts bytes.

World: at each byte, the longest vocabulary entry that the remaining bytes begin with. 65529 entries have the ids 1 to 65529.
They come with the `pyrwkv-tokenizer` package, whose encoder is used: it is thirty times as fast as one in Python. Its decoder
is not: it aborts on half a character. The table checks the encoder before its first text.

Pile: the byte-level BPE of GPT-NeoX-20B, from the 20B_tokenizer.json that its user has, encoded by the `tokenizers` package.
"""

import ast
import functools
import hashlib
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rwkv_core.errors import InputError, WorldError

END = 0
"""Token after each document, and before the first."""

VOCAB_SIZE = 65536
"""Rows of a World model's embedding."""

FIRST_FREE = 65530
"""The first of the ids that World has no bytes for, up to the last."""

_PILE_SIZES = range(50277, 50433)  # 50277 ids; some models' rows are filled up to a multiple of 128

_VOCABULARY = "rwkv_vocab_v20230424.txt"
_DIGEST = "e8e7025bfbfa9c6e071fa66e7539d655133c2cfabe9b1a9c72a98e2114b35dc5"

# Where a tokenizer can go wrong: seams of blanks and newlines, roles, long runs, several scripts, each single character.
_PROBES = (
    "User: What is it?\n\nAssistant:** A list\n\n- one\n- two\n\n\n",
    "def f(x):\n        return x ** 2  # 平方\r\n\t\t\tpass" + " " * 200,
    "。\n\nUser: 你好，世界！ Привет, мир. こんにちは 🦅🪿 e\u0301 \x00\x01\x7f \u200b<|endoftext|>",
    "".join(map(chr, range(0x180))),
)


class Tokenizer:
    """Text to ids and back."""

    def __init__(self, table: Sequence[bytes], encode: Callable[[str], list[int]], *, normalizes: bool = False) -> None:
        self.table = table
        """Bytes of each id, empty for 0 and for the free ids."""
        self.encode = encode
        """Text -> ids. A whole document at a time: cut text has other tokens at the cuts."""
        self.normalizes = normalizes
        """Whether text is brought into Unicode's form NFC before it is encoded, and so decodes to that."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ids, one after the other; they may end inside a character."""
        return b"".join(self.table[i] for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, with U+FFFD where their bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the table, whatever the line ends of the file it came from."""
        return digest(self.table)

    def with_special(self, special: Mapping[str, int]) -> "Tokenizer":
        """This tokenizer with texts that are one token each: World's free ids.

        Text is cut where a special one stands, from the left, at the longest of those that begin there; what is between is
        encoded as ever, each piece by itself.

        Raises:
            InputError: this is not the World tokenizer; or a text is empty or a token already, or an id is not free.
        """
        if not special:
            return self
        shown = ", ".join(f"{text!r}: {i}" for text, i in special.items())
        if self.digest != _DIGEST:
            raise InputError(
                f"special_tokens {{{shown}}}", "only the World vocabulary has free ids", "set none, or take world"
            )
        table = list(self.table)
        for text, i in special.items():
            if not text or text.encode() in self.table:
                raise InputError(f"special token {text!r}", "must be a text that is no token yet", "choose another")
            if not FIRST_FREE <= i < VOCAB_SIZE or table[i]:
                raise InputError(
                    f"special token {text!r}: {i}",
                    f"free are {FIRST_FREE} to {VOCAB_SIZE - 1}, each once",
                    "choose another",
                )
            table[i] = text.encode()
        pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))  # the longest first
        plain = self.encode

        def encode(text: str) -> list[int]:
            ids, at = list[int](), 0
            for match in pattern.finditer(text):
                ids += plain(text[at : match.start()])
                ids.append(special[match[0]])
                at = match.end()
            return [*ids, *plain(text[at:])] if at else plain(text)

        return Tokenizer(tuple(table), encode)


def digest(table: Sequence[bytes]) -> str:
    """SHA-256 over id, length and bytes of every entry."""
    sha = hashlib.sha256()
    for i, entry in enumerate(table):
        if entry:
            sha.update(b"%d %d " % (i, len(entry)) + entry)
    return sha.hexdigest()


@functools.cache
def world() -> Tokenizer:
    """The World tokenizer. Its encoder, which takes 240 MB, is there from the first text on, and checked then.

    Raises:
        WorldError: the package is missing, or its vocabulary is not the published one; or, from `encode`, its encoder disagrees
            with it.
    """
    spec = importlib.util.find_spec("pyrwkv_tokenizer")
    if spec is None or spec.origin is None:
        raise WorldError(
            "pyrwkv_tokenizer", "the World vocabulary comes with it", "pip install pyrwkv-tokenizer==0.9.1"
        )
    file = Path(spec.origin).with_name(_VOCABULARY)
    table = read_vocabulary(file)

    @functools.cache
    def encoder() -> Callable[[str], list[int]]:
        from pyrwkv_tokenizer import RWKVTokenizer

        encode: Callable[[str], list[int]] = RWKVTokenizer().encode
        reference = greedy_encoder(table)
        if any(encode(probe) != reference(probe) for probe in _PROBES):
            raise WorldError("pyrwkv_tokenizer", "does not encode greedily", "install pyrwkv-tokenizer==0.9.1 anew")
        return encode

    tokenizer = Tokenizer(table, lambda text: encoder()(text))
    if tokenizer.digest != _DIGEST:
        raise WorldError(str(file), "is not the published World vocabulary", "install pyrwkv-tokenizer==0.9.1 anew")
    return tokenizer


def read_vocabulary(file: Path) -> tuple[bytes, ...]:
    """The table in a vocabulary file: lines of id, Python literal of a str or bytes, and its length in bytes."""
    table = [b""] * VOCAB_SIZE
    for line in file.read_text(encoding="utf-8").splitlines():
        first, last = line.index(" "), line.rindex(" ")
        written = line[first:last].strip()
        quote, inner = written[:1], written[1:-1]
        if quote in ("'", '"') and written[-1] == quote and quote not in inner and "\\" not in inner:
            literal = inner  # means itself; Python's parser takes six times as long
        else:
            literal = ast.literal_eval(written)
        entry: bytes = literal.encode() if isinstance(literal, str) else literal
        if len(entry) != int(line[last:]):
            raise WorldError(f"{file}: {line!r}", "the length at the line's end must fit", "get the published file")
        table[int(line[:first])] = entry
    return tuple(table)


def greedy_encoder(table: Sequence[bytes]) -> Callable[[str], list[int]]:
    """The definition, in Python: slow, and what the fast encoder is measured against."""
    ids = {entry: i for i, entry in enumerate(table) if entry}
    longest = max(map(len, ids))

    def encode(text: str) -> list[int]:
        data, out, at = text.encode(), [], 0
        while at < len(data):
            end = next(e for e in range(min(at + longest, len(data)), at, -1) if data[at:e] in ids)
            out.append(ids[data[at:end]])
            at = end
        return out

    return encode


@functools.cache
def bytes_tokenizer() -> Tokenizer:
    """A token for each byte, 256 in all; but 0 is the end here too, so the character U+0000 has no token.

    Its `encode` raises an InputError for text that has one.
    """

    def encode(text: str) -> list[int]:
        if "\0" in text:
            raise InputError(f"U+0000 at character {text.index(chr(0))}", "0 is the end of a document", "remove it")
        return list(text.encode())

    return Tokenizer((b"", *(bytes([byte]) for byte in range(1, 256))), encode)


@functools.cache
def pile(file: Path) -> Tokenizer:
    """The tokenizer in a `tokenizers` file: 20B_tokenizer.json, of the Pile and Raven models, or another byte-level BPE.

    Text never becomes token 0: "<|endoftext|>" in it is encoded as the characters it consists of. The 20B tokenizer brings text
    into Unicode's form NFC before it encodes.

    Raises:
        InputError: there is no such file, or it has no byte-level BPE whose token 0 is <|endoftext|>.
        WorldError: the package is missing.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise WorldError("tokenizers", f"the package that reads {file} is missing", "pip install 'rwkv-flow[pile]'")
    import tokenizers

    if not file.is_file():
        raise InputError(str(file), "no tokenizer is there", "correct the path, or download 20B_tokenizer.json to it")
    try:
        bpe = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more special
        raise InputError(f"{file} ({error})", "must be a file of the tokenizers package", "download it again") from None
    bpe.encode_special_tokens = True  # True: as ordinary text
    added = bpe.get_added_tokens_decoder()
    if END not in added or added[END].content != "<|endoftext|>":
        raise InputError(str(file), "its token 0 must be <|endoftext|>", "give the 20B_tokenizer.json of RWKV-4 Pile")
    table, byte_of = [b""] * bpe.get_vocab_size(), _byte_characters()
    try:
        for token, i in bpe.get_vocab().items():
            if i not in added:
                table[i] = bytes(byte_of[character] for character in token)
    except KeyError:
        raise InputError(f"{file}: {token!r}", "is no token of a byte-level BPE", "give 20B_tokenizer.json") from None
    for i, special in added.items():
        table[i] = b"" if special.special else special.content.encode()

    def encode(text: str) -> list[int]:
        ids: list[int] = bpe.encode(text, add_special_tokens=False).ids
        return ids

    normalizes = encode("e\u0301") == encode("\u00e9")
    tokenizer = Tokenizer(tuple(table), encode, normalizes=normalizes)
    for probe in _PROBES:
        if tokenizer.decode(tokenizer.encode(probe)) != (unicodedata.normalize("NFC", probe) if normalizes else probe):
            raise InputError(f"{file}: {probe[:20]!r}...", "does not decode to itself", "give 20B_tokenizer.json")
    return tokenizer


def named(name: str, special: Mapping[str, int] | None = None) -> Tokenizer:
    """The tokenizer that a setting names, with special tokens: "world", "bytes", or the path of a `tokenizers` file.

    Errors are those of each, and of `with_special`.
    """
    match name:
        case "world":
            tokenizer = world()
        case "bytes":
            tokenizer = bytes_tokenizer()
        case _:
            tokenizer = pile(Path(name))
    return tokenizer.with_special(special or {})


def for_vocabulary(size: int, file: Path | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        size: rows of its embedding, `vocab_size`; 0 where it is not known: World, if no file says otherwise.
        file: of the `tokenizers` package; None where the size says enough.

    Returns:
        With a table of `size` entries.

    Raises:
        InputError: the size tells no tokenizer and there is no file, or the file has more tokens than the model.
        WorldError: what the tokenizer comes with is missing.
    """
    if file is not None:
        tokenizer = pile(file)
        if 0 < size < len(tokenizer.table):
            raise InputError(
                f"{file} has {len(tokenizer.table)} tokens", f"the model has {size}", "give the tokenizer of this model"
            )
        free = [b""] * (size - len(tokenizer.table))  # rows that fill the embedding up
        return Tokenizer((*tokenizer.table, *free), tokenizer.encode, normalizes=tokenizer.normalizes)
    if size in (0, VOCAB_SIZE):
        return world()
    if size == 256:
        return bytes_tokenizer()
    if size in _PILE_SIZES:
        raise InputError(
            f"a vocabulary of {size}",
            "is that of the Pile models, whose tokenizer is a file",
            "give their 20B_tokenizer.json",
        )
    raise InputError(
        f"a vocabulary of {size}", f"known are {VOCAB_SIZE} (World) and 256 (bytes)", "give the tokenizer's file"
    )


def _byte_characters() -> dict[str, int]:
    """The characters by which a byte-level BPE writes the 256 bytes.

    Source: openai/gpt-2, src/encoder.py: the visible Latin-1 characters stand for themselves, and those from U+0100 on for the
    other bytes, in order.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}
