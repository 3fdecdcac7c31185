import struct

import numpy as np
import pytest

from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.errors import InputError

DOCUMENTS = [[5, 6, 0], [0], [65535, 1, 2, 3, 0]]


def write(prefix, documents):
    writer = Writer(prefix)
    for document in documents:
        writer.add(document)
    writer.close()


def by_hand(prefix, documents, code, letter):
    """The layout, spelled out."""
    sizes = [len(document) for document in documents]
    width = struct.calcsize(letter)
    offsets = [width * sum(sizes[:i]) for i in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + bytes([code])
    index += struct.pack("<QQ", len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *offsets)
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    prefix.with_suffix(".idx").write_bytes(index)
    tokens = [token for document in documents for token in document]
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))


@pytest.mark.parametrize("documents", [DOCUMENTS, [[7, 0]], []], ids=["three", "one", "none"])
def test_writes_the_layout_byte_for_byte(documents, tmp_path):
    write(tmp_path / "ours", documents)
    by_hand(tmp_path / "hand", documents, 8, "H")
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"hand{suffix}").read_bytes()


@pytest.mark.parametrize(("code", "letter"), [(8, "H"), (4, "i")], ids=["uint16", "int32"])
def test_reads_both_widths(code, letter, tmp_path):
    by_hand(tmp_path / "x", DOCUMENTS, code, letter)
    documents = Documents(tmp_path / "x")
    assert [documents[i].tolist() for i in range(len(documents))] == DOCUMENTS
    assert documents.tokens == 9
    assert documents.sizes.tolist() == [3, 1, 5]


def test_names_with_dots_are_whole_names(tmp_path):
    write(tmp_path / "v1.2", DOCUMENTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v1.2.bin", "v1.2.idx"]
    assert len(Documents(tmp_path / "v1.2")) == 3


def test_documents_of_no_tokens_are_kept(tmp_path):
    write(tmp_path / "x", [[], [1, 0], []])
    documents = Documents(tmp_path / "x")
    assert [documents[i].tolist() for i in range(3)] == [[], [1, 0], []]


def test_many_documents(tmp_path):
    rng = np.random.default_rng(0)
    wanted = [rng.integers(0, 65536, rng.integers(1, 30)).tolist() for _ in range(2000)]
    write(tmp_path / "x", wanted)
    documents = Documents(tmp_path / "x")
    assert [documents[i].tolist() for i in range(len(documents))] == wanted


@pytest.mark.parametrize("token", [-1, 65536])
def test_a_token_that_does_not_fit_is_refused(token, tmp_path):
    with pytest.raises(OverflowError):
        Writer(tmp_path / "x").add([token])


def damage(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def set_bytes(at, value):
    return lambda data: data.__setitem__(slice(at, at + len(value)), value)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".idx", set_bytes(0, b"X"), "x.idx: is not a binidx index; make it anew"),
        (".idx", lambda data: data.clear(), "x.idx: is not a binidx index"),
        (".idx", lambda data: data.__delitem__(slice(20, None)), "x.idx: is not a binidx index"),
        (".idx", set_bytes(9, b"\x02"), "version 2, dtype code 8, 3 items"),
        (".idx", set_bytes(17, b"\x06"), "dtype code 6, 3 items, .* version 1 index of codes"),
        (".idx", set_bytes(18, b"\x04"), "4 items"),
        (".idx", lambda data: data.pop(), "3 items"),
        (".idx", lambda data: data.append(0), "3 items"),
        (".idx", set_bytes(34, b"\x04"), "x.idx: its sizes and offsets do not fit: .*; make both anew"),
        (".idx", set_bytes(46, b"\x02"), "x.idx: its sizes and offsets"),
        (".idx", set_bytes(54, b"\x05"), "x.idx: its sizes and offsets"),
        (".idx", set_bytes(34, struct.pack("<3i", 3, -1, 7)), "x.idx: its sizes and offsets"),
        (".bin", lambda data: data.pop(), "x.bin: 17 bytes: its index says 18"),
        (".bin", lambda data: data.extend(b"\x00\x00"), "x.bin: 20 bytes"),
    ],
    ids=["magic", "empty", "cut header", "version", "width", "items", "cut", "long", "size", "first offset", "offset",
         "negative size", "bin cut", "bin long"],
)  # fmt: skip
def test_what_is_damaged_is_refused(suffix, change, message, tmp_path):
    write(tmp_path / "x", DOCUMENTS)
    damage(tmp_path / f"x{suffix}", change)
    with pytest.raises(InputError, match=message):
        Documents(tmp_path / "x")


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_a_missing_half_is_named(suffix, tmp_path):
    write(tmp_path / "x", DOCUMENTS)
    (tmp_path / f"x{suffix}").unlink()
    with pytest.raises(InputError, match=rf"x\{suffix}: a binidx is a .bin and an .idx; run the prepare stage"):
        Documents(tmp_path / "x")
