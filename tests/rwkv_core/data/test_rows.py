import itertools
import math
from collections import Counter

import numpy as np
import pytest
from documents import config, documents
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rwkv_core.data.magic_prime import magic_prime
from rwkv_core.data.order import Part
from rwkv_core.data.rows import LaneRows, MagicPrimeRows, PackedRows, StreamRows, WindowRows, best_fit, next_fit, rows
from rwkv_core.data.sampling import tokens_of
from rwkv_core.errors import InputError
from rwkv_core.tokenizer import END

quick = settings(deadline=None, max_examples=100)
seeds = st.none() | st.integers(0, 2**31 - 1)
contexts = st.integers(2, 12)

WHOLE = {
    "stream": {"rows": "stream"},
    "pack": {"rows": "pack"},
    "pack, carried": {"rows": "pack", "carry_state": True},
    "chunk": {"rows": "chunk"},
    "chunk, carried": {"rows": "chunk", "carry_state": True},
}
"""Modes that leave nothing out."""
MODES = WHOLE | {"pad": {"rows": "pad"}, "only": {"rows": "only"}, "magic_prime": {"rows": "magic_prime"}}
STATEFUL = ("pad", "only", "chunk, carried")


@st.composite
def sets(draw):
    """ctx_len, and the lengths of documents: of one token to three windows."""
    ctx_len = draw(contexts)
    return ctx_len, draw(st.lists(st.integers(1, 3 * ctx_len), min_size=1, max_size=12))


def made(mode, ctx_len, sizes, seed, *, after_state=False, parts=(), world=1, masks=None, weights=None, **changes):
    changes = MODES[mode] | changes
    return rows(
        documents(sizes, masks=masks, weights=weights),
        config(changes.pop("rows"), ctx_len, **changes),
        seed,
        after_state=after_state,
        parts=parts,
        world=world,
    )


def epoch(cut, number):
    return range(cut.before(number), cut.before(number + 1))


def read(cut, number):
    """(inputs, targets) of each reading of a row."""
    return [tuple(x.tolist() for x in tokens_of(cut.documents, reading)[:2]) for reading in cut.row(number)]


@quick
@given(data=sets(), seed=seeds, mode=st.sampled_from(list(WHOLE)))
def test_each_token_is_a_target_once_an_epoch(data, seed, mode):
    ctx_len, sizes = data
    cut = made(mode, ctx_len, sizes, seed)
    firsts = {int(document[0]) for document in (cut.documents[i] for i in range(len(sizes)))}
    for number in (0, 1, 5):
        found = [read(cut, n) for n in epoch(cut, number)]
        targets = [t for row in found for _, targets in row for t in targets]
        assert sorted(targets) == list(range(1, sum(sizes) + 1))
        for row in found:
            assert sum(len(inputs) for inputs, _ in row) <= ctx_len
            for inputs, targets in row:
                assert len(inputs) == len(targets) > 0
                for place, (before, target) in enumerate(zip(inputs, targets, strict=True)):
                    if target not in firsts:
                        assert before == target - 1
                    elif place and mode in ("stream", "pack, carried"):
                        assert before == targets[place - 1]
                    elif mode != "stream":
                        assert before == END
    assert cut.left_out == (0, 0)


@quick
@given(data=sets(), seed=seeds)
def test_a_stream_is_documents_end_to_end(data, seed):
    ctx_len, sizes = data
    cut = made("stream", ctx_len, sizes, seed)
    assert isinstance(cut, StreamRows)
    for number in (0, 1, 5):
        assert len(epoch(cut, number)) == math.ceil(sum(sizes) / ctx_len)
        pairs = [pair for n in epoch(cut, number) for pair in read(cut, n)]
        assert all(len(targets) == ctx_len for _, targets in pairs[:-1])
        inputs, targets = ([x for pair in pairs for x in pair[side]] for side in (0, 1))
        assert inputs == [END, *targets[:-1]]
        wanted = {int(cut.documents[i][0]): cut.documents[i].tolist() for i in range(len(sizes))}
        at = 0
        while at < len(targets):
            document = wanted.pop(targets[at])
            assert targets[at : at + len(document)] == document
            at += len(document)
        assert not wanted


@quick
@given(data=sets(), seed=seeds, mode=st.sampled_from(["pad", "only"]), after_state=st.booleans())
def test_each_document_is_a_row_once_an_epoch(data, seed, mode, after_state):
    ctx_len, sizes = data
    sizes = [size + 1 for size in sizes]
    cut = made(mode, ctx_len, sizes, seed, after_state=after_state)
    assert isinstance(cut, WindowRows)
    for number in (0, 1, 5):
        assert len(epoch(cut, number)) == len(sizes)
        whole = {tuple([] if after_state else [END]) + tuple(cut.documents[i].tolist()) for i in range(len(sizes))}
        wanted = sorted((list(x[:-1][:ctx_len]), list(x[1:][:ctx_len])) for x in whole)
        assert sorted(pair for n in epoch(cut, number) for pair in read(cut, n)) == wanted
    lost = [max(size - after_state - ctx_len, 0) for size in sizes]
    assert cut.left_out == (sum(n > 0 for n in lost), sum(lost))


@quick
@given(data=sets(), seed=seeds, mode=st.sampled_from(list(MODES)), world=st.sampled_from([1, 3]), draw=st.data())
def test_any_row_can_be_asked_for(data, seed, mode, world, draw):
    """In any order, by an object that has seen other rows or none; and the tokens before it are those of the rows before."""
    ctx_len, sizes = data
    assume(mode != "magic_prime" or sum(sizes) >= 3 * ctx_len)
    one, other = (made(mode, ctx_len, sizes, seed, world=world) for _ in range(2))
    in_turn = [one.row(n) for n in range(one.before(3))]
    lengths = [sum(map(len, row)) for row in in_turn]
    for number in draw.draw(st.permutations(range(len(in_turn)))):
        assert other.row(number) == in_turn[number]
        assert other.tokens_before(number) == sum(lengths[:number])
    assert one.tokens_before(len(in_turn)) == sum(lengths)
    assert one.epochs(one.before(2)) == 2


@pytest.mark.parametrize("rank_and_world", [(0, 1), (1, 2), (2, 3)], ids=str)
def test_magic_prime_is_the_formula_of_rwkv_lm(rank_and_world):
    """RWKV-v7/train_temp/src/dataset.py, written out: the stream's tokens are their places in it, plus 1."""
    (rank, world), ctx_len, sizes = rank_and_world, 7, [30, 1, 50, 7, 200, 3, 122]
    cut = made("magic_prime", ctx_len, sizes, 5)
    assert isinstance(cut, MagicPrimeRows)
    stream = np.arange(sum(sizes)) + 1
    p = 53
    assert magic_prime(len(stream), ctx_len) == p
    assert p % 3 == 2
    assert p <= len(stream) // ctx_len - 1 < 59  # no prime of that kind between: 59 is the next
    seen = []
    for idx in range(2 * p):
        ii = 1 + idx * world + rank
        offset = ((int(p * (math.sqrt(5) - 1) / 2) * ii * ii * ii) % p) * ctx_len
        dix = stream[offset : offset + ctx_len + 1]
        ((inputs, targets),) = read(cut, idx * world + rank)
        assert inputs == dix[:-1].tolist()
        assert targets == dix[1:].tolist()
        seen.append(offset)
    assert len(epoch(cut, 0)) == p
    if world == 1:
        assert sorted(seen[:p]) == list(range(0, p * ctx_len, ctx_len)) == sorted(seen[p:])
    assert cut.left_out == (0, sum(sizes) - p * ctx_len)


def test_magic_prime_needs_three_windows_and_its_held_out_rows_are_a_stream():
    with pytest.raises(InputError, match=r"train.ctx_len = 8 and 23 tokens: magic_prime orders 3 windows .* stream"):
        made("magic_prime", 8, [23], 1)
    assert isinstance(made("magic_prime", 8, [23], None), StreamRows)


@quick
@given(data=sets(), seed=seeds, carry=st.booleans())
def test_whole_documents_are_packed(data, seed, carry):
    ctx_len, sizes = data
    cut = made("pack", ctx_len, sizes, seed, carry_state=carry)
    assert isinstance(cut, PackedRows)
    assert cut.apart is not carry
    whole = set()
    for n in epoch(cut, 0):
        row = cut.row(n)
        assert carry is False or len(row) == 1
        pieces = [piece for reading in row for piece in reading.pieces]
        assert all(len(reading.pieces) == 1 for reading in row) or carry
        assert not any(reading.goes_on for reading in row)
        whole |= {p.document for p in pieces if (p.start, p.stop) == (0, sizes[p.document])}
    assert whole == {i for i, size in enumerate(sizes) if size <= ctx_len}
    if seed is None:  # in their own order, as many as there is room for
        order = [(p.document, p.start) for n in epoch(cut, 0) for reading in cut.row(n) for p in reading.pieces]
        assert order == sorted(order)
    assert {cut.row(n) for n in epoch(cut, 0)} == {cut.row(n) for n in epoch(cut, 3)}


@quick
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_fits(lengths):
    lengths = np.array(lengths)
    for fit in (next_fit, best_fit):
        found = fit(lengths, 20)
        assert set(found.tolist()) == set(range(found.max() + 1))
        assert np.bincount(found, lengths).max() <= 20
    least = -(-lengths.sum() // 20)
    assert best_fit(lengths, 20).max() + 1 <= 11 / 9 * least + 6 / 9 + 1  # Dosa 2007: best fit and first fit decreasing
    in_turn = next_fit(lengths, 20)
    for row in range(in_turn.max()):
        assert lengths[in_turn == row].sum() + lengths[in_turn == row + 1][0] > 20


@quick
@given(data=sets(), seed=seeds, micro_batch=st.integers(1, 3), accumulate=st.integers(1, 2), world=st.integers(1, 2))
def test_windows_follow_each_other_in_a_lane(data, seed, micro_batch, accumulate, world):
    ctx_len, sizes = data
    cut = made("chunk, carried", ctx_len, sizes, seed, world=world, micro_batch=micro_batch, accumulate=accumulate)
    assert isinstance(cut, LaneRows)
    assert cut.lanes == micro_batch * accumulate * world
    for number in (0, 1):
        assert epoch(cut, number).start % cut.lanes == 0
        loads = []
        for lane in range(cut.lanes):
            in_lane = [cut.row(n) for n in epoch(cut, number)[lane :: cut.lanes]]
            loads.append(sum(bool(row) for row in in_lane))
            assert all(in_lane[: loads[-1]])
            assert not any(in_lane[loads[-1] :])
            last = None
            for (reading,) in in_lane[: loads[-1]]:
                (piece,) = reading.pieces
                if reading.goes_on:
                    assert (piece.document, piece.start) == (last.document, last.stop)
                    assert last.stop - last.start == ctx_len, "its state is that at the end of the row"
                else:
                    assert piece.start == 0
                    assert last is None or last.stop == sizes[last.document]
                last = piece
            assert last is None or last.stop == sizes[last.document]
        assert max(loads) == len(epoch(cut, number)) // cut.lanes
        assert max(loads) - min(loads) <= max(-(-size // ctx_len) for size in sizes)


def of(cut, number):
    """The documents of an epoch, in the order of its rows."""
    return [piece.document for n in epoch(cut, number) for reading in cut.row(n) for piece in reading.pieces]


def test_epochs_and_seeds_have_orders_of_their_own():
    for mode in WHOLE:
        orders = [of(made(mode, 3, [3] * 30, seed), number) for seed in (0, 1, 2**31 - 1) for number in (0, 1, 2)]
        assert len(set(map(tuple, orders))) == 9, mode
        assert all(sorted(o) == list(range(30)) for o in orders)
        assert of(made(mode, 3, [3] * 30, None), 0) == list(range(30))
        assert of(made(mode, 3, [3] * 30, 8, order="as_given"), 1) == list(range(30))


def test_orders_are_fair():
    first = Counter(of(made("stream", 3, [3] * 4, seed), 0)[0] for seed in range(400))
    assert min(first.values()) > 60


@pytest.mark.parametrize("mode", ["pad", "only", "chunk", "stream"])
def test_orders_by_length(mode):
    sizes = [*range(1, 41), *range(1, 41)]
    for order, sign in (("short_first", 1), ("long_first", -1)):
        cut = made(mode, 64, sizes, 3, order=order)
        orders = [of(cut, number) for number in (0, 1)]
        if mode == "stream":  # a document goes over a row's end
            orders = [list(dict.fromkeys(o)) for o in orders]
        for o in orders:
            assert [sizes[i] for i in o] == sorted(sizes, key=lambda n: sign * n)
        assert orders[0] != orders[1], "those of one length are shuffled"


@quick
@given(
    count=st.integers(1, 60), step=st.integers(2, 9), seed=st.integers(0, 99), mode=st.sampled_from(["pad", "chunk"])
)
def test_rows_of_like_length_share_a_step(count, step, seed, mode):
    sizes = np.random.default_rng(seed).integers(1, 100, count).tolist()
    cut = made(mode, 100, sizes, seed, order="similar_lengths", micro_batch=step)
    lengths = [len(cut.row(n)[0]) for n in range(cut.before(4))]
    for number in range(4):
        its = epoch(cut, number)
        assert sorted(of(cut, number)) == list(range(count))
        whole = [n for n in range(0, its.stop, step) if n >= its.start and n + step <= its.stop]
        spans = sorted((min(lengths[n : n + step]), max(lengths[n : n + step])) for n in whole)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    if count >= 60:
        orders = [[lengths[n] for n in epoch(cut, number)] for number in range(2)]
        assert orders[0] != orders[1]


def test_steps_of_like_length_are_shuffled():
    cut = made("pad", 100, list(range(1, 61)), 3, order="similar_lengths", micro_batch=6)
    steps = [[len(cut.row(n)[0]) // 6 for n in range(first, first + 6)] for first in range(0, 60, 6)]
    assert steps != sorted(steps)


PARTS = (Part("chat", 0, 7, 0, 0), Part("replay", 7, 10, 0, 0), Part("code", 17, 3, 0, 0))


@quick
@given(mode=st.sampled_from([m for m in MODES if m != "magic_prime"]), seed=st.integers(0, 99), draw=st.data())
def test_parts_are_mixed_as_asked(mode, seed, draw):
    """Every unit of a part is used equally often; passes are exact over the epochs."""
    often = {"chat": "3x", "replay": "0.3x", "code": "1.5x"}
    sizes = [4] * 20  # of one length: a unit is a document
    cut = made(mode, 4, sizes, seed, mix=often, parts=PARTS)
    epochs = draw.draw(st.sampled_from([1, 2, 3, 10, 20]))
    used = Counter(itertools.chain.from_iterable(set_of(cut, number, mode) for number in range(epochs)))
    for part in PARTS:
        counts = [used[i] for i in range(part.first, part.first + part.documents)]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == math.floor(round(float(often[part.name][:-1]) * 10) * part.documents * epochs / 10)


def set_of(cut, number, mode):
    return of(cut, number)


def test_passes_have_orders_of_their_own():
    cut = made("pad", 4, [4] * 20, 1, mix={"chat": "2x"}, parts=PARTS)
    assert of(cut, 0) != of(cut, 1)
    chat = [[i for i in of(cut, number) if i < 7] for number in (0, 1)]
    assert all(sorted(c) == sorted([*range(7)] * 2) for c in chat)
    assert chat[0] != chat[1]
    as_given = made("pad", 4, [4] * 20, 1, mix={"chat": "2x"}, parts=PARTS, order="as_given")
    assert of(as_given, 0) == [*range(7), *range(7), *range(7, 20)]


@pytest.mark.parametrize("mode", ["stream", "pad", "pack", "chunk", "chunk, carried"])
def test_a_share_is_one_of_tokens(mode):
    sizes = [20] * 7 + [5] * 10 + [10] * 3
    cut = made(mode, 16, sizes, 1, mix={"replay": "10%", "code": "2x"}, parts=PARTS)
    read = Counter()
    for n in range(cut.before(40)):
        for reading in cut.row(n):
            for piece in reading.pieces:
                read[next(p.name for p in reversed(PARTS) if piece.document >= p.first)] += piece.stop - piece.start
    assert read["replay"] / sum(read.values()) == pytest.approx(0.1, abs=0.002)
    chat, code = (7 * 20, 3 * 10) if mode != "pad" else (7 * 16, 3 * 10)
    assert (read["chat"], read["code"]) == (40 * chat, 40 * 2 * code)


@pytest.mark.parametrize(
    ("mix", "found"),
    [
        ({"talk": "2x"}, "train.mix has talk: the data has the parts chat, replay, code; name one of these"),
        (
            {"chat": "20%", "replay": "30%", "code": "40%"},
            "train.mix has a share for each of chat, replay, code: a share",
        ),
    ],
)
def test_mixes_that_can_not_be_are_refused(mix, found):
    with pytest.raises(InputError, match=found):
        made("stream", 4, [4] * 20, 1, mix=mix, parts=PARTS)


def test_parts_must_be_those_of_the_documents():
    for parts in (PARTS[:2], PARTS[1:], (PARTS[0], PARTS[2])):
        with pytest.raises(InputError, match=r"the manifest's parts end at document .*: there are 20; prepare"):
            made("stream", 4, [4] * 20, 1, parts=parts)


def test_parts_alone_change_nothing_but_the_draw():
    """A part that is not named is read once an epoch."""
    cut = made("stream", 4, [4] * 20, 1, parts=PARTS)
    assert sorted(of(cut, 0)) == sorted(of(cut, 1)) == list(range(20))
    one = (Part("all", 0, 20, 80, 80),)
    assert of(made("stream", 4, [4] * 20, 1, parts=one), 2) == of(made("stream", 4, [4] * 20, 1), 2)


def test_the_share_that_is_learned():
    half = [Part("chat", 0, 1, 10, 5), Part("code", 1, 1, 10, 10)]
    assert made("stream", 4, [10, 10], 1, parts=half).learned() == 0.75
    assert made("stream", 4, [10, 10], 1, parts=half, mix={"chat": "3x"}).learned() == 25 / 40
    masks = [[True] * 4, [False] * 4]
    assert made("stream", 4, [4, 4], 1, masks=masks).learned() == 0.5


def test_a_document_without_anything_to_predict_is_refused():
    made("pad", 8, [3, 1], None)
    for mode in (*STATEFUL, "pack"):
        with pytest.raises(
            InputError, match="document 1 has 1 tokens: a row needs one to read and one to predict; prepare"
        ):
            made(mode, 8, [3, 1], None, after_state=True)
    with pytest.raises(InputError, match="no tokens: there must be some to learn; prepare the data anew"):
        made("stream", 8, [], None)


def test_after_a_state_a_document_s_first_token_is_read_alone():
    for mode in (*STATEFUL, "pack"):
        cut = made(mode, 8, [3, 6], None, after_state=True)
        pairs = [pair for n in epoch(cut, 0) for pair in read(cut, n)]
        assert pairs == [([1, 2], [2, 3]), ([4, 5, 6, 7, 8], [5, 6, 7, 8, 9])], mode
    carried = made("chunk, carried", 3, [8], None, after_state=True)
    pairs = [pair for n in epoch(carried, 0) for pair in read(carried, n)]
    assert pairs == [([1, 2, 3], [2, 3, 4]), ([4, 5, 6], [5, 6, 7]), ([7], [8])]


def test_a_state_can_not_stand_before_the_later_pieces_of_a_packed_document():
    assert made("pack", 8, [9, 3], 1, after_state=True).before(1) == 2
    with pytest.raises(
        InputError, match=r"document 1 has 10 tokens, and train.ctx_len is 8: .* pack would cut this one"
    ):
        made("pack", 8, [3, 10], 1, after_state=True)
