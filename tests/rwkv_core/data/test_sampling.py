import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.head_loss import IGNORE
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.sampling import MicroBatches, PackedRows
from rwkv_core.tokenizer import END


def documents(sizes):
    """No two tokens are the same, so that each says where it comes from."""
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder) / "x")
        first = 1
        for size in sizes:
            writer.add(range(first, first + size))
            first += size
        writer.close()
        return Documents(Path(folder) / "x")


lengths = st.lists(st.integers(1, 20), min_size=1, max_size=12)
contexts = st.integers(2, 33)
seeds = st.none() | st.integers(0, 2**31 - 1)
quick = settings(deadline=None, max_examples=150)


@quick
@given(sizes=lengths, ctx_len=contexts, seed=seeds)
def test_each_token_is_a_target_once_an_epoch(sizes, ctx_len, seed):
    data = documents(sizes)
    rows = PackedRows(data, ctx_len, seed)
    assert rows.per_epoch == -(-sum(sizes) // ctx_len)
    for epoch in (0, 1, 5):
        pairs = [rows.row(epoch * rows.per_epoch + i) for i in range(rows.per_epoch)]
        inputs, targets = (np.concatenate(side) for side in zip(*pairs, strict=True))
        assert {len(x) for pair in pairs for x in pair} == {ctx_len}
        stream = targets[: sum(sizes)]
        assert (targets[sum(sizes) :] == IGNORE).all()
        assert sorted(stream) == list(range(1, sum(sizes) + 1))
        # whole documents, one after the other
        wanted = {int(data[i][0]): data[i].tolist() for i in range(len(data))}
        at = 0
        while at < len(stream):
            document = wanted.pop(int(stream[at]))
            assert stream[at : at + len(document)].tolist() == document
            at += len(document)
        assert not wanted
        # each input is the token before its target, and token 0 before the first
        assert inputs[: len(stream)].tolist() == [END, *stream[:-1]]
        assert (inputs[len(stream) :] == END).all()


@quick
@given(sizes=lengths, ctx_len=contexts, seed=seeds, data=st.data())
def test_any_row_can_be_asked_for(sizes, ctx_len, seed, data):
    """In any order, by an object that has seen other rows or none."""
    rows = PackedRows(documents(sizes), ctx_len, seed)
    in_turn = [rows.row(i) for i in range(3 * rows.per_epoch)]
    for number in data.draw(st.permutations(range(len(in_turn)))):
        for x, want in zip(rows.row(number), in_turn[number], strict=True):
            assert x.tolist() == want.tolist()
    fresh = PackedRows(documents(sizes), ctx_len, seed).row(len(in_turn) - 1)
    assert [x.tolist() for x in fresh] == [x.tolist() for x in in_turn[-1]]


def order(seed, epoch, count=30):
    rows = PackedRows(documents([3] * count), 3, seed)
    return [int(rows.row(epoch * count + i)[1][0]) for i in range(count)]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [order(seed, epoch) for seed in (0, 1, 2**31 - 1) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 9
    assert all(sorted(o) == list(range(1, 91, 3)) for o in orders)
    assert order(7, 1) == order(7, 1)
    assert order(None, 0) == order(None, 1) == list(range(1, 91, 3))


def test_orders_are_fair():
    first = Counter(order(seed, 0, count=4)[0] for seed in range(400))
    assert min(first.values()) > 60


@quick
@given(
    sizes=lengths, ctx_len=contexts, seed=seeds, micro_batch=st.integers(1, 5), accumulate=st.integers(1, 4),
    epochs=st.floats(0.05, 3.2),
)  # fmt: skip
def test_micro_batches_are_the_rows_cut_up(sizes, ctx_len, seed, micro_batch, accumulate, epochs):
    rows = PackedRows(documents(sizes), ctx_len, seed)
    batches = MicroBatches(rows, micro_batch, accumulate, epochs)
    all_of_them = [batches[i] for i in range(len(batches))]
    total = max(1, round(epochs * rows.per_epoch))
    for part, side in enumerate(("inputs", "targets")):
        got = [row for batch in all_of_them for row in getattr(batch, side).tolist()]
        assert got == [rows.row(i)[part].tolist() for i in range(total)]
    assert all(len(batch.inputs) == micro_batch for batch in all_of_them[:-1])
    learned = [int((batch.targets != IGNORE).sum()) for batch in all_of_them]
    assert batches.steps == -(-len(batches) // accumulate)
    for step in range(batches.steps):
        group = slice(step * accumulate, (step + 1) * accumulate)
        assert {batch.step_tokens for batch in all_of_them[group]} == {sum(learned[group])}
        assert batches.tokens_before(step) == sum(learned[: step * accumulate])
    assert batches.tokens_before(batches.steps) == sum(learned)
    assert all(batch.step_tokens > 0 for batch in all_of_them)


@pytest.mark.parametrize(("epochs", "tokens"), [(0.001, 8), (0.5, 50 - 50 % 8), (1, 100), (1.5, 100 + 56), (2, 200)])
def test_fractions_of_an_epoch(epochs, tokens):
    """Rows are whole: 100 tokens are 13 rows of 8, of which the last has 4."""
    batches = MicroBatches(PackedRows(documents([10] * 10), 8, 0), 1, 1, epochs)
    assert batches.tokens_before(batches.steps) == tokens
