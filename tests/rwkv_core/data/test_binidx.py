import itertools
import math
import random
import struct
import subprocess
import sys

import numpy as np
import pytest

from rwkv_core.data import binidx
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.errors import InputError

DOCUMENTS = [[5, 6, 0], [0], [65535, 1, 2, 3, 0]]
LEARNED = [[False, True, True], [True], [True, False, False, True, True]]
WEIGHTS = [1.0, 0.5, 3.0]
LETTERS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def write(prefix, documents, learned=None, weights=None, **how):
    writer = Writer(prefix, **how)
    for i, document in enumerate(documents):
        mask = None if learned is None else np.array(learned[i], bool)
        writer.add(document, mask, 1.0 if weights is None else weights[i])
    writer.close()


def by_hand(prefix, documents, code, letter, pieces=None):
    """The layout, spelled out. `pieces`: how many tokens each item has, for each document."""
    pieces = [[len(document)] for document in documents] if pieces is None else pieces
    sizes = [size for document in pieces for size in document]
    firsts = [0, *itertools.accumulate(map(len, pieces))]
    width = struct.calcsize(letter)
    offsets = [width * sum(sizes[:i]) for i in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + bytes([code])
    index += struct.pack("<QQ", len(sizes), len(firsts))
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *offsets)
    index += struct.pack(f"<{len(firsts)}q", *firsts)
    prefix.with_suffix(".idx").write_bytes(index)
    tokens = [token for document in documents for token in document]
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))


def read_by_hand(prefix):
    """Documents, masks and weights of four files whose index is in order: another reader, of the layout alone."""
    index, data = (prefix.with_suffix(ending).read_bytes() for ending in (".idx", ".bin"))
    magic, version, code, items, n = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    sizes = struct.unpack_from(f"<{items}i", index, 34)
    firsts = struct.unpack_from(f"<{n}q", index, 34 + 12 * items)
    ends = [0, *itertools.accumulate(sizes)]
    tokens = struct.unpack(f"<{ends[-1]}{LETTERS[code]}", data)
    mask, weights = prefix.with_suffix(".mask"), prefix.with_suffix(".weights")
    bits = [1] * len(tokens)
    if mask.exists():
        bits = [mask.read_bytes()[i // 8] >> i % 8 & 1 for i in range(len(tokens))]
    cuts = [(ends[a], ends[b]) for a, b in itertools.pairwise(firsts)]
    counts = struct.unpack(f"<{n - 1}f", weights.read_bytes()) if weights.exists() else [1.0] * (n - 1)
    return [list(tokens[a:b]) for a, b in cuts], [[*map(bool, bits[a:b])] for a, b in cuts], list(counts)


def everything(prefix):
    """The same, by ours."""
    documents = Documents(prefix)
    documents.check()
    numbers = range(len(documents))
    return (
        [documents[i].tolist() for i in numbers],
        [documents.learned(i).tolist() for i in numbers],
        [documents.weight(i) for i in numbers],
    )


def some_documents(seed, count, longest=30):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 65536, rng.integers(0, longest)).tolist() for _ in range(count)]
    learned = [(rng.random(len(document)) < 0.5).tolist() for document in documents]
    return documents, learned, rng.random(count, np.float32).tolist()


@pytest.mark.parametrize(("dtype", "code", "letter"), [("uint16", 8, "H"), ("int32", 4, "i")])
@pytest.mark.parametrize("documents", [DOCUMENTS, [[7, 0]], []], ids=["three", "one", "none"])
def test_writes_the_layout_byte_for_byte(documents, dtype, code, letter, tmp_path):
    write(tmp_path / "ours", documents, dtype=dtype)
    by_hand(tmp_path / "hand", documents, code, letter)
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"hand{suffix}").read_bytes()


def test_masks_and_weights_stand_beside_byte_for_byte(tmp_path):
    write(tmp_path / "x", DOCUMENTS, LEARNED, WEIGHTS)
    assert (tmp_path / "x.mask").read_bytes() == bytes([0b10011110, 0b1])
    assert (tmp_path / "x.weights").read_bytes() == struct.pack("<3f", *WEIGHTS)
    assert everything(tmp_path / "x") == (DOCUMENTS, LEARNED, WEIGHTS)
    assert Documents(tmp_path / "x").has_mask


def test_without_them_all_is_learned_and_counts_once(tmp_path):
    write(tmp_path / "x", DOCUMENTS, LEARNED, WEIGHTS)
    write(tmp_path / "x", DOCUMENTS, LEARNED, WEIGHTS, beside=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    assert everything(tmp_path / "x") == (DOCUMENTS, [[True] * len(x) for x in DOCUMENTS], [1.0] * 3)
    assert not Documents(tmp_path / "x").has_mask


@pytest.mark.parametrize("piece", [8, 16, 1 << 18])
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_reads_what_it_writes_and_so_does_another_reader(dtype, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "_PIECE", piece)  # documents shorter and longer than what is written at a time
    wanted = some_documents(0, 300)
    write(tmp_path / "x", *wanted, dtype=dtype)
    assert read_by_hand(tmp_path / "x") == wanted
    assert everything(tmp_path / "x") == wanted


@pytest.mark.parametrize("kind", [np.uint16, np.int64, np.uint8, np.int32, ">u2", list])
def test_tokens_may_be_any_array_of_integers(kind, tmp_path):
    documents = [[5, 6, 0], [], [255, 1]]
    write(tmp_path / "x", documents if kind is list else [np.array(x, kind) for x in documents])
    assert everything(tmp_path / "x")[0] == documents


@pytest.mark.parametrize("code", LETTERS)
def test_reads_every_width(code, tmp_path):
    documents = [[5, 6, 0], [0], [127, 1, 2, 3, 0]]
    by_hand(tmp_path / "x", documents, code, LETTERS[code])
    assert everything(tmp_path / "x")[0] == documents
    opened = Documents(tmp_path / "x")
    assert opened.tokens == 9
    assert opened.sizes.tolist() == [3, 1, 5]
    assert opened[-1].tolist() == documents[-1]
    with pytest.raises(IndexError):
        opened[3]


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_negative_tokens_are_found(code, tmp_path):
    by_hand(tmp_path / "x", [[1, 2], [3, -1]], code, LETTERS[code])
    with pytest.raises(InputError, match=r"x.bin: token -1 at 3: tokens are not negative"):
        Documents(tmp_path / "x").check()


def test_several_items_make_a_document(tmp_path):
    """As Megatron-LM writes sentences."""
    documents = [[1, 2, 3, 0], [4, 0], [5, 6, 7, 8, 9, 0], []]
    by_hand(tmp_path / "x", documents, 8, "H", [[2, 1, 1], [2], [0, 5, 1, 0], []])
    assert everything(tmp_path / "x")[0] == documents == read_by_hand(tmp_path / "x")[0]
    opened = Documents(tmp_path / "x")
    assert (opened.sizes.tolist(), opened.tokens, len(opened)) == ([4, 2, 6, 0], 12, 4)
    (tmp_path / "x.mask").write_bytes(bytes([0b00110001, 0]))
    (tmp_path / "x.weights").write_bytes(struct.pack("<4f", 1, 2, 3, 4))
    assert everything(tmp_path / "x") == read_by_hand(tmp_path / "x")


def test_names_with_dots_are_whole_names(tmp_path):
    write(tmp_path / "v1.2", DOCUMENTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v1.2.bin", "v1.2.idx", "v1.2.mask", "v1.2.weights"]
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


@pytest.mark.parametrize(("dtype", "most"), [("uint16", 65535), ("int32", 2**31 - 1)])
def test_a_token_that_does_not_fit_is_refused(dtype, most, tmp_path):
    writer = Writer(tmp_path / "x", dtype)
    writer.add([most])
    for token in (-1, most + 1):
        for tokens in ([0, token], np.array([0, token])):
            with pytest.raises(InputError, match=f"document 1: token {token}: {dtype} files hold 0 to {most}"):
                writer.add(tokens)
    writer.close()
    assert everything(tmp_path / "x")[0] == [[most]]


def test_a_mask_or_weight_that_can_not_be_its_own_is_refused(tmp_path):
    writer = Writer(tmp_path / "x")
    with pytest.raises(InputError, match=r"document 0: a mask of \(2,\) for 3 tokens"):
        writer.add([1, 2, 0], np.array([True, False]))
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="document 0: a weight of"):
            writer.add([1, 2, 0], weight=weight)


def test_files_that_were_not_closed_are_no_binidx(tmp_path):
    write(tmp_path / "x", DOCUMENTS)
    Writer(tmp_path / "x").add([1, 0])
    with pytest.raises(InputError, match="is not a binidx index"):
        Documents(tmp_path / "x")


@pytest.mark.parametrize("kept", [None, 0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("piece", [8, 1 << 18])
@pytest.mark.parametrize("again", [False, True])
def test_shards_are_joined(kept, piece, again, tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "_PIECE", piece)
    shards = [some_documents(seed, count) for seed, count in enumerate([40, 0, 1, 57])]
    prefixes = [tmp_path / f"shard{i}" for i in range(len(shards))]
    rng = np.random.default_rng(5)
    keep = None if kept is None else [rng.random(len(shard[0])) < kept for shard in shards]
    for i, (prefix, (documents, learned, weights)) in enumerate(zip(prefixes, shards, strict=True)):
        write(prefix, documents, learned, weights, beside=i != 3)  # one without a mask
        shards[i] = read_by_hand(prefix)
    writer = Writer(tmp_path / "joined")
    if again:  # there were others, longer
        for prefix in (*reversed(prefixes), prefixes[0]):
            writer.append(Documents(prefix))
        writer.restart()
    for i, prefix in enumerate(prefixes):
        writer.append(Documents(prefix), None if keep is None else keep[i])
    writer.close()
    wanted = tuple(
        [x for i, shard in enumerate(shards) for j, x in enumerate(shard[part]) if keep is None or keep[i][j]]
        for part in range(3)
    )
    assert read_by_hand(tmp_path / "joined") == wanted == everything(tmp_path / "joined")
    write(tmp_path / "at-once", *wanted)
    for ending in (".bin", ".idx", ".mask", ".weights"):
        assert (tmp_path / f"joined{ending}").read_bytes() == (tmp_path / f"at-once{ending}").read_bytes()


def test_only_like_shards_are_joined(tmp_path):
    write(tmp_path / "a", DOCUMENTS)
    write(tmp_path / "b", DOCUMENTS, dtype="int32")
    writer = Writer(tmp_path / "c")
    with pytest.raises(InputError, match="b: int32: is joined to uint16"):
        writer.append(Documents(tmp_path / "b"))
    with pytest.raises(ValueError, match="a: keep has"):
        writer.append(Documents(tmp_path / "a"), np.ones(len(DOCUMENTS) + 1, bool))
    writer.append(Documents(tmp_path / "a"))
    writer.close()
    assert everything(tmp_path / "c") == everything(tmp_path / "a")
    Writer(tmp_path / "none").close()
    assert len(Documents(tmp_path / "none")) == 0


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
        (".idx", set_bytes(17, b"\x06"), "x.idx: dtype code 6: is of floating-point numbers; tokens are integers"),
        (".idx", set_bytes(18, b"\x04"), "4 items"),
        (".idx", lambda data: data.pop(), "3 items"),
        (".idx", lambda data: data.append(0), "3 items"),
        (".idx", set_bytes(34, b"\x04"), "x.idx: document 0: its size and offset do not fit: .*; make both anew"),
        (".idx", set_bytes(46, b"\x02"), "x.idx: document 0: its size and offset"),
        (".idx", set_bytes(54, b"\x05"), "x.idx: document 0: its size and offset"),
        (".idx", set_bytes(34, struct.pack("<3i", 3, -1, 7)), "x.bin: 18 bytes: its index says 22"),
        (".idx", set_bytes(34, struct.pack("<3i", 5, -1, 5)), "x.idx: document 0: its size and offset"),
        (".idx", set_bytes(70, b"\x01"), "x.idx: document 0 begins with item 1"),
        (".idx", set_bytes(94, b"\x02"), "x.idx: document 3 begins with item 2"),
        (".bin", lambda data: data.pop(), "x.bin: 17 bytes: its index says that a token has 2"),
        (".bin", lambda data: data.extend(b"\x00\x00"), "x.bin: 20 bytes"),
        (".mask", lambda data: data.pop(), "x.mask: 1 bytes: 2 are for these documents"),
        (".weights", lambda data: data.append(0), "x.weights: 13 bytes: 12 are for these documents"),
    ],
    ids=["magic", "empty", "cut header", "version", "width", "items", "cut", "long", "size", "first offset", "offset",
         "negative size", "negative size that fits", "first document", "last document", "bin cut", "bin long", "mask",
         "weights"],
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


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".idx", set_bytes(78, b"\x02"), "x.idx: document 1 begins with item 2"),
        (".mask", set_bytes(1, b"\x02"), "x.mask: a bit is set after the last"),
        (".weights", set_bytes(4, struct.pack("<f", math.nan)), "x.weights: document 1: nan: a weight is a number"),
        (".weights", set_bytes(4, struct.pack("<f", -1)), "x.weights: document 1: -1.0"),
    ],
    ids=["document", "mask", "weight", "negative weight"],
)
def test_what_opening_does_not_see_the_check_names(suffix, change, message, tmp_path):
    write(tmp_path / "x", DOCUMENTS)
    damage(tmp_path / f"x{suffix}", change)
    documents = Documents(tmp_path / "x")
    with pytest.raises(InputError, match=message):
        documents.check()


def test_a_document_out_of_place_is_named_when_it_is_read(tmp_path):
    """Among more than opening looks at."""
    write(tmp_path / "x", [[i, 0] for i in range(1000)])
    damage(tmp_path / "x.idx", set_bytes(34 + 4 * 501, struct.pack("<i", 3)))
    documents = Documents(tmp_path / "x")
    assert documents[500].tolist() == [500, 0]
    with pytest.raises(InputError, match=r"x\.idx: document 501: its size and offset do not fit"):
        documents[501]
    with pytest.raises(InputError, match=r"x\.idx: document 501: its size and offset do not fit"):
        documents.check()


def test_sizes_that_make_up_for_each_other_are_found(tmp_path):
    """Document 502 begins before 501, which has less than no tokens: the places fit."""
    write(tmp_path / "x", [[i, 0] for i in range(1000)])
    damage(tmp_path / "x.idx", set_bytes(34 + 4 * 501, struct.pack("<2i", -1, 5)))
    damage(tmp_path / "x.idx", set_bytes(34 + 4000 + 8 * 502, struct.pack("<q", 4 * 501 - 2)))
    documents = Documents(tmp_path / "x")
    for look in (documents.check, lambda: documents[501]):
        with pytest.raises(InputError, match=r"x\.idx: document 501: its size and offset do not fit"):
            look()


def test_a_document_that_begins_inside_a_token_is_refused(tmp_path):
    write(tmp_path / "x", [[i, 0] for i in range(1000)])
    damage(tmp_path / "x.idx", set_bytes(34 + 4000 + 8 * 501, struct.pack("<2q", 4 * 501 + 1, 4 * 502 + 1)))
    with pytest.raises(InputError, match=r"x\.idx: document 501: its size and offset do not fit"):
        Documents(tmp_path / "x")[501]
    by_hand(tmp_path / "y", [[1, 2, 3, 0], [4, 0]], 8, "H", [[2, 2], [2]])
    damage(tmp_path / "y.idx", set_bytes(34 + 12 + 16, struct.pack("<q", 9)))
    with pytest.raises(InputError, match=r"y\.idx: document 0: its size and offset do not fit"):
        Documents(tmp_path / "y")


def corrupt(rng, data):
    """One or two of what happens to files."""
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(data)) if data else 0
        match rng.randrange(7):
            case 0:
                del data[at:]
            case 1 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at : at + 8] = rng.randbytes(min(8, len(data) - at))
            case 3:
                data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 8]))
            case 4:
                del data[at : at + rng.choice([1, 2, 4, 8])]
            case 5:
                data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x80"])[: len(data) - at]
            case 6 if len(data) > 17:
                data[17] = rng.randrange(12)  # the code, where it is an index


@pytest.mark.parametrize("several", [False, True], ids=["one item each", "several items"])
@pytest.mark.parametrize("suffix", [".idx", ".bin", ".mask", ".weights"])
def test_of_corrupted_files_everything_is_right_or_named(suffix, several, tmp_path):
    """What the index says twice, sizes and places, has to be as it was. Tokens, bits and weights are what the bytes now are;
    so is the document that an item belongs to, where the index has several in one: nothing else tells it."""
    documents, learned, weights = some_documents(1, 12)
    write(tmp_path / "x", documents, learned, weights)
    if several:
        pieces = [[len(x) // 3, len(x) - len(x) // 3] if i % 2 else [len(x)] for i, x in enumerate(documents)]
        by_hand(tmp_path / "x", documents, 8, "H", pieces)
    whole = everything(tmp_path / "x")
    assert whole == read_by_hand(tmp_path / "x") == (documents, learned, weights)
    file = tmp_path / f"x{suffix}"
    sound, rng, refused = file.read_bytes(), random.Random(f"{suffix} {several}"), 0
    for _ in range(400):
        data = bytearray(sound)
        corrupt(rng, data)
        file.write_bytes(data)
        try:
            found = everything(tmp_path / "x")
        except InputError:
            refused += 1
            continue
        assert found == read_by_hand(tmp_path / "x")
        if suffix == ".idx" and not several:
            assert found == whole
    assert refused > {".idx": 380, ".bin": 150, ".mask": 150, ".weights": 200}[suffix] - 60 * several


MANY, EACH = 20_000_000, 2500


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """50 G tokens in 20 M documents: 100 GB, of which the tokens that are read are there."""
    prefix = tmp_path_factory.mktemp("huge") / "x"
    with (prefix.with_suffix(".idx")).open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, MANY, MANY + 1))
        file.write(np.full(MANY, EACH, "<i4").data)
        for at in range(0, MANY, 1_000_000):
            file.write((np.arange(at, at + 1_000_000, dtype="<i8") * (2 * EACH)).data)
        for at in range(0, MANY, 1_000_000):
            file.write(np.arange(at, at + 1_000_000, dtype="<i8").data)
        file.write(struct.pack("<q", MANY))
    with prefix.with_suffix(".bin").open("wb") as file:
        for i in (0, 2**31 // EACH + 1, MANY - 1):
            file.seek(2 * EACH * i)
            file.write(struct.pack(f"<{EACH}H", *range(i % 7, EACH + i % 7)))
    with prefix.with_suffix(".mask").open("wb") as file:
        i = MANY - 1
        file.seek(i * EACH // 8)
        file.write(np.packbits(np.arange(-(i * EACH % 8), EACH) % 3 == 0, bitorder="little").tobytes())
    yield prefix
    for file in prefix.parent.iterdir():
        file.unlink()


def test_a_hundred_gigabytes_open_at_once_and_in_no_memory(huge):
    documents = Documents(huge)
    assert (len(documents), documents.tokens) == (MANY, MANY * EACH)
    for i in (0, 2**31 // EACH + 1, MANY - 1):
        assert documents[i].tolist() == list(range(i % 7, EACH + i % 7))
    assert documents[2**31 // EACH + 2].max() == 0
    assert documents.learned(MANY - 1).tolist() == [i % 3 == 0 for i in range(EACH)]
    assert not documents.learned(2**31 // EACH + 1).any()
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rwkv_core.data.binidx import Documents\n"
        "def memory(kind): return int(next(x for x in open('/proc/self/status') if x.startswith(kind)).split()[1])\n"
        "before = memory('RssAnon')\n"
        "documents = Documents(Path(sys.argv[1]))\n"
        "documents[len(documents) - 1]\n"
        "opened, peak = memory('RssAnon'), memory('VmHWM')\n"
        "documents.check()\n"
        "print(opened - before, memory('VmHWM') - peak)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(huge)], capture_output=True, text=True, check=True)
    opened, checked = map(int, done.stdout.split())
    assert opened < 5_000  # kB, of an index of 400 MB; its mapped pages belong to the system
    assert checked < 30_000
