import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.head_loss import IGNORE
from rwkv_core.config import TrainConfig
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.sampling import DocumentRows, MicroBatches, PackedRows, rows
from rwkv_core.errors import InputError
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


of_two = st.lists(st.integers(2, 20), min_size=1, max_size=12)
lead_or_not = st.booleans()


@quick
@given(sizes=of_two, ctx_len=contexts, seed=seeds, after_state=lead_or_not)
def test_each_document_is_a_row_once_an_epoch(sizes, ctx_len, seed, after_state):
    data = documents(sizes)
    cut = DocumentRows(data, ctx_len, seed, after_state=after_state)
    assert cut.per_epoch == len(sizes)
    for epoch in (0, 1, 5):
        wanted = {int(data[i][0]): [*([] if after_state else [END]), *data[i].tolist()] for i in range(len(data))}
        for i in range(len(sizes)):
            inputs, targets = (x.tolist() for x in cut.row(epoch * len(sizes) + i))
            whole = wanted.pop(inputs[0] if after_state else targets[0])
            assert inputs == whole[:-1][:ctx_len]
            assert targets == whole[1:][:ctx_len]
        assert not wanted
    lost = [max(size - after_state - ctx_len, 0) for size in sizes]
    assert cut.left_out == (sum(n > 0 for n in lost), sum(lost))
    assert PackedRows(data, ctx_len, seed).left_out == (0, 0)


@quick
@given(sizes=of_two, ctx_len=contexts, seed=seeds, after_state=lead_or_not, data=st.data())
def test_any_document_can_be_asked_for(sizes, ctx_len, seed, after_state, data):
    one = DocumentRows(documents(sizes), ctx_len, seed, after_state=after_state)
    in_turn = [one.row(i) for i in range(3 * one.per_epoch)]
    learned = [len(targets) for _, targets in in_turn]
    other = DocumentRows(documents(sizes), ctx_len, seed, after_state=after_state)
    for number in data.draw(st.permutations(range(len(in_turn)))):
        assert [x.tolist() for x in other.row(number)] == [x.tolist() for x in in_turn[number]]
        assert other.targets_before(number) == sum(learned[:number])


@pytest.mark.parametrize("after_state", [False, True])
def test_documents_are_filled_up_to_the_longest_of_their_micro_batch(after_state):
    cut = DocumentRows(documents([3, 9, 5, 2, 4]), 6, None, after_state=after_state)
    batches = MicroBatches(cut, 2, 2, 1.0)
    got = [batches[i] for i in range(len(batches))]
    assert [batch.inputs.shape for batch in got] == (
        [(2, 6), (2, 4), (1, 3)] if after_state else [(2, 6), (2, 5), (1, 4)]
    )
    first = got[0]
    if after_state:
        assert first.inputs.tolist() == [[1, 2, END, END, END, END], [4, 5, 6, 7, 8, 9]]
        assert first.targets.tolist() == [[2, 3, *[IGNORE] * 4], [5, 6, 7, 8, 9, 10]]
    else:
        assert first.inputs.tolist() == [[END, 1, 2, END, END, END], [END, 4, 5, 6, 7, 8]]
        assert first.targets.tolist() == [[1, 2, 3, *[IGNORE] * 3], [4, 5, 6, 7, 8, 9]]


def test_a_document_without_anything_to_predict_is_refused():
    DocumentRows(documents([3, 1]), 8, None, after_state=False)
    with pytest.raises(
        InputError, match="document 1 has 1 tokens: a row needs one to read and one to predict; prepare"
    ):
        DocumentRows(documents([3, 1]), 8, None, after_state=True)


def test_rows_are_as_the_settings_say():
    data = documents([3, 4])
    packed, cut = (TrainConfig.model_construct(ctx_len=8, rows=kind) for kind in ("packed", "documents"))
    assert type(rows(data, packed, 1)) is PackedRows
    assert type(rows(data, cut, 1)) is DocumentRows
    assert [len(rows(data, cut, None, after_state=x).row(0)[0]) for x in (False, True)] == [3, 2]
    with pytest.raises(
        InputError, match=r"train.rows = packed: adapter.state stands at a document's .*; set documents"
    ):
        rows(data, packed, 1, after_state=True)


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
    sizes=of_two, ctx_len=contexts, seed=seeds, micro_batch=st.integers(1, 5), accumulate=st.integers(1, 4),
    epochs=st.floats(0.05, 3.2), kind=st.sampled_from(["packed", "documents", "after a state"]),
)  # fmt: skip
def test_micro_batches_are_the_rows_cut_up(sizes, ctx_len, seed, micro_batch, accumulate, epochs, kind):
    data = documents(sizes)
    if kind == "packed":
        rows = PackedRows(data, ctx_len, seed)
    else:
        rows = DocumentRows(data, ctx_len, seed, after_state=kind == "after a state")
    batches = MicroBatches(rows, micro_batch, accumulate, epochs)
    all_of_them = [batches[i] for i in range(len(batches))]
    total = max(1, round(epochs * rows.per_epoch))
    wanted = iter(rows.row(i) for i in range(total))
    for batch in all_of_them:
        width = 0
        for given_inputs, given_targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            inputs, targets = (x.tolist() for x in next(wanted))
            width = max(width, len(inputs))
            left = len(given_inputs) - len(inputs)
            assert given_inputs == inputs + [END] * left
            assert given_targets == targets + [IGNORE] * left
        assert batch.inputs.shape == batch.targets.shape == (len(batch.inputs), width)
    assert next(wanted, None) is None
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
