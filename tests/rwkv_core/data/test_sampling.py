import numpy as np
import pytest
import torch
from documents import config, documents
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels.head_loss import IGNORE
from rwkv_core.data.rows import Piece, Reading, rows
from rwkv_core.data.sampling import LONGER, MicroBatches, extent, tokens_of
from rwkv_core.tokenizer import END

MODES = {
    "stream": {"rows": "stream"},
    "pad": {"rows": "pad"},
    "pack": {"rows": "pack"},
    "pack, carried": {"rows": "pack", "carry_state": True},
    "chunk": {"rows": "chunk"},
    "chunk, carried": {"rows": "chunk", "carry_state": True},
    "magic_prime": {"rows": "magic_prime"},
    "pad, similar_lengths": {"rows": "pad", "order": "similar_lengths"},
    "pad, short_first": {"rows": "pad", "order": "short_first"},
    "stream, mixed": {"rows": "stream", "mix": {"all": "0.7x"}},
    "chunk, carried, mixed": {"rows": "chunk", "carry_state": True, "mix": {"all": "1.5x"}},
}
quick = settings(deadline=None, max_examples=150)


@st.composite
def sets(draw):
    """ctx_len, and documents of one token to three windows, with masks and weights or without."""
    ctx_len = draw(st.integers(2, 10))
    sizes = draw(st.lists(st.integers(1, 3 * ctx_len), min_size=1, max_size=12))
    masks = draw(st.none() | st.tuples(*(st.lists(st.booleans(), min_size=n, max_size=n) for n in sizes)))
    weights = draw(
        st.none() | st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=len(sizes), max_size=len(sizes))
    )
    return ctx_len, documents(sizes, masks=masks, weights=weights)


def what_counts(data):
    """The weight of each token of a set that is learned."""
    return {
        int(token): data.weight(i)
        for i in range(len(data))
        for token, learned in zip(data[i], data.learned(i), strict=True)
        if learned and data.weight(i)
    }


def targets_of(batch):
    """(input, target, weight) of all that a micro-batch learns."""
    found = []
    for group in batch.groups:
        weights = torch.ones(group.targets.shape) if group.weights is None else group.weights
        learned = group.targets != IGNORE
        found += zip(*(x[learned].tolist() for x in (group.inputs, group.targets, weights)), strict=True)
    return found


@quick
@given(
    data=sets(), mode=st.sampled_from(list(MODES)), seed=st.integers(0, 99), micro_batch=st.integers(1, 4),
    accumulate=st.integers(1, 3), epochs=st.floats(0.05, 2.6),
)  # fmt: skip
def test_micro_batches_are_the_rows_cut_up(data, mode, seed, micro_batch, accumulate, epochs):
    """What is learned, what it weighs, and what a step's loss is divided by, in every mode."""
    ctx_len, data = data
    assume("magic" not in mode or data.tokens >= 3 * ctx_len)
    assume("similar" not in mode or micro_batch * accumulate > 1)
    settings = config(**{"ctx_len": ctx_len, "micro_batch": micro_batch, "accumulate": accumulate} | MODES[mode])
    cut, counts = rows(data, settings, seed), what_counts(data)
    total = cut.in_epochs(epochs)
    batches = MicroBatches(cut, micro_batch, accumulate, total)
    found = [batches[i] for i in range(len(batches))]
    assert batches.steps == -(-len(batches) // accumulate)
    for number, batch in enumerate(found):
        wanted = []
        for n in range(number * micro_batch, min((number + 1) * micro_batch, total)):
            for reading in cut.row(n):
                inputs, targets, _ = tokens_of(data, reading)
                plain = [int(t) for p in reading.pieces for t in data[p.document][p.start : p.stop]]
                assert targets.tolist() == [t if t in counts else IGNORE for t in plain]
                wanted += [(i, t, counts[t]) for i, t in zip(inputs.tolist(), plain, strict=True) if t in counts]
        assert sorted(targets_of(batch)) == sorted(wanted)
        assert batch.learned == len(wanted)
        weights = {x is None for x in (group.weights for group in batch.groups)}
        assert weights <= {True} or any(data.weight(i) != 1 for i in range(len(data))), "None where all are 1"
    for step in range(batches.steps):
        its = found[step * accumulate : (step + 1) * accumulate]
        weight = sum(w for batch in its for _, _, w in targets_of(batch))
        assert [batch.step_weight for batch in its] == [pytest.approx(weight)] * len(its)
    assert sum(batch.tokens for batch in found) == cut.tokens_before(total)


@quick
@given(
    data=sets(),
    mode=st.sampled_from(["stream", "pack", "pack, carried", "chunk", "chunk, carried"]),
    seed=st.integers(0, 99),
)
def test_each_learned_token_is_a_target_once_an_epoch(data, mode, seed):
    ctx_len, data = data
    settings = config(**{"ctx_len": ctx_len, "micro_batch": 2, "accumulate": 2} | MODES[mode])
    cut = rows(data, settings, seed)
    batches = MicroBatches(cut, 2, 2, cut.before(1))
    found = sorted((t, w) for i in range(len(batches)) for _, t, w in targets_of(batches[i]))
    assert found == sorted(what_counts(data).items())


def test_what_fills_up_is_behind_and_not_learned():
    data = documents([3, 9, 5, 2, 4], weights=[1.0, 1.0, 2.0, 1.0, 1.0])
    batches = MicroBatches(rows(data, config("pad", 6), None), 2, 2, 5)
    first, second, third = (batches[i] for i in range(3))
    (group,) = first.groups
    assert group.inputs.tolist() == [[END, 1, 2, END, END, END], [END, 4, 5, 6, 7, 8]]
    assert group.targets.tolist() == [[1, 2, 3, *[IGNORE] * 3], [4, 5, 6, 7, 8, 9]]
    assert group.weights is group.lanes is group.goes_on is None
    assert second.groups[0].weights.tolist() == [[2.0] * 5, [1.0] * 5]
    assert third.groups[0].inputs.shape == (1, 4)
    assert [batch.step_weight for batch in (first, second, third)] == [21, 21, 4]
    assert [(batch.learned, batch.tokens) for batch in (first, second, third)] == [(9, 9), (7, 7), (4, 4)]
    with pytest.raises(IndexError, match="micro-batch 3 of 3"):
        batches[3]


@pytest.mark.parametrize("seed", range(3))
def test_packed_documents_are_run_with_those_of_like_length(seed):
    sizes = np.random.default_rng(seed).integers(1, 60, 50).tolist()
    cut = rows(documents(sizes), config("pack", 64), seed)
    batches = MicroBatches(cut, 8, 1, cut.before(1))
    for batch in (batches[i] for i in range(len(batches))):
        lengths = [(group.targets != IGNORE).sum(1) for group in batch.groups]
        assert all(x.max() <= LONGER * x.min() for x in lengths)
        assert all(x.max() == group.targets.shape[1] for x, group in zip(lengths, batch.groups, strict=True))
    assert len(batches[0].groups) < sum(len(group.inputs) for group in batches[0].groups)


def everything(batch):
    return [
        None if x is None else x.tolist()
        for group in batch.groups
        for x in group
    ] + [batch.step_weight, batch.learned, batch.tokens]  # fmt: skip


SIZES = np.random.default_rng(0).integers(1, 40, 60).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_workers_change_nothing(mode):
    data = documents(SIZES, masks=[np.arange(n) % 3 > 0 for n in SIZES])
    cut = rows(data, config(**{"ctx_len": 16, "micro_batch": 3, "accumulate": 2} | MODES[mode]), 5)
    batches = MicroBatches(cut, 3, 2, cut.in_epochs(2.4))
    none, two = (
        [everything(batch) for batch in torch.utils.data.DataLoader(batches, batch_size=None, num_workers=n)]
        for n in (0, 2)
    )
    assert none == two == [everything(batches[i]) for i in range(len(batches))]


@pytest.mark.parametrize("mode", MODES)
def test_a_step_has_the_same_rows_however_it_is_shared(mode):
    """Among processes, micro-batches and rows: what is learned, and what it is divided by."""
    data = documents(SIZES, masks=[np.arange(n) % 3 > 0 for n in SIZES])
    found = []
    for micro_batch, accumulate, world in ((8, 1, 1), (2, 4, 1), (4, 1, 2), (1, 4, 2), (2, 1, 4), (1, 2, 4)):
        settings = config(**{"ctx_len": 16, "micro_batch": micro_batch, "accumulate": accumulate} | MODES[mode])
        steps: dict[int, tuple[list, set]] = {}
        for rank in range(world):
            cut = rows(data, settings, 5, world=world)
            batches = MicroBatches(cut, micro_batch, accumulate, cut.in_epochs(1.7), rank=rank, world=world)
            for i in range(len(batches)):
                targets, weights = steps.setdefault(i // accumulate, ([], set()))
                targets += targets_of(batches[i])
                weights.add(batches[i].step_weight)
        found.append({step: (sorted(targets), weights) for step, (targets, weights) in steps.items()})
    assert all(one == found[0] for one in found)
    assert all(len(weights) == 1 for _, weights in found[0].values())


def test_a_lane_stays_in_its_place_of_its_process():
    data = documents([70, 50, 33, 8, 90])
    for micro_batch, accumulate, world in ((4, 1, 1), (2, 2, 1), (1, 2, 2)):
        settings = config("chunk", 8, carry_state=True, micro_batch=micro_batch, accumulate=accumulate)
        for rank in range(world):
            cut = rows(data, settings, 5, world=world)
            batches = MicroBatches(cut, micro_batch, accumulate, cut.before(1), rank=rank, world=world)
            last = {}
            for number in range(len(batches)):
                for group in batches[number].groups:
                    learned = [[t for t in row if t != IGNORE] for row in group.targets.tolist()]
                    for lane, goes_on, row in zip(group.lanes.tolist(), group.goes_on.tolist(), learned, strict=True):
                        place = number % accumulate * micro_batch + lane // world % micro_batch
                        assert lane == place * world + rank
                        if goes_on:
                            assert last[lane] == (number // accumulate - 1, row[0] - 1)
                        last[lane] = number // accumulate, row[-1]


@pytest.mark.parametrize(
    ("rows_", "length", "found"),
    [
        ("stream", {"epochs": 0.001}, (1, 1 / 13, 1, 8)),
        ("stream", {"epochs": 0.5}, (6, 6 / 13, 3, 48)),
        ("stream", {"epochs": 1.5}, (20, 1 + 7 / 13, 10, 156)),
        ("stream", {"epochs": 2}, (26, 2, 13, 200)),
        ("stream", {"epochs": None, "steps": 10}, (20, 1 + 7 / 13, 10, 156)),
        ("stream", {"epochs": None, "tokens": 156}, (20, 1 + 7 / 13, 10, 156)),
        ("stream", {"epochs": None, "tokens": 149}, (20, 1 + 7 / 13, 10, 156)),
        ("stream", {"epochs": None, "tokens": 148}, (19, 1 + 6 / 13, 10, 148)),
        ("pad", {"epochs": None, "tokens": 81}, (11, 1.1, 6, 88)),
        ("magic_prime", {"epochs": 1}, (11, 1, 6, 88)),
    ],
)
def test_how_long_a_run_is(rows_, length, found):
    """Rows are whole: 100 tokens in a stream are 13 rows of 8, of which the last has 4."""
    settings = config(rows_, 8, micro_batch=2, **{"epochs": None} | length)
    whole = extent(rows(documents([10] * 10), settings, 0), settings)
    assert whole == pytest.approx(found)


def test_a_mix_changes_how_long_an_epoch_is():
    settings = config("stream", 8, micro_batch=2, epochs=2, mix={"all": "0.25x"})
    cut = rows(documents([10] * 10), settings, 0)
    assert [cut.before(e) for e in range(5)] == [0, 3, 7, 10, 14], "2, 3, 2 and 3 documents"
    assert extent(cut, settings) == (7, 2, 4, 50)


def test_tokens_of_pieces_end_to_end():
    data = documents([4, 5], masks=[[0, 0, 1, 1], [1, 0, 1, 1, 1]], weights=[2.0, 1.0])
    inputs, targets, weights = tokens_of(data, Reading((Piece(0, 2, 4), Piece(1, 0, 3)), before=99))
    assert inputs.tolist() == [2, 3, 4, 5, 6]
    assert targets.tolist() == [3, 4, 5, IGNORE, 7]
    assert weights.tolist() == [2, 2, 1, 1, 1]
    inputs, targets, weights = tokens_of(data, Reading((Piece(1, 0, 1),), before=99))
    assert (inputs.tolist(), targets.tolist(), weights) == ([99], [5], None)
