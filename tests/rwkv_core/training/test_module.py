"""What a micro-batch's loss and gradients are, against documents run one by one."""

import itertools

import pytest
import pytorch_lightning as pl
import torch
from documents import config, documents
from random_models import VERSIONS, make

from kernels.head_loss import IGNORE
from rwkv_core.adapters.state import give
from rwkv_core.data.rows import rows
from rwkv_core.data.sampling import MicroBatches
from rwkv_core.errors import InputError
from rwkv_core.models.state import BlockState
from rwkv_core.training.module import Training

SIZES = [3, 17, 9, 5, 12, 2, 16, 7]
WEIGHTS = [1.0, 0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0]
MASKS = [[(7 * i + j) % 3 > 0 for j in range(size)] for i, size in enumerate(SIZES)]


def training(model, settings):
    return Training(model, [], settings, 10, 0)


def steps(model, data, settings, *, seed=3, after_state=False, accumulate=None):
    """The micro-batches of one epoch, and what each of them adds to its step's loss."""
    cut = rows(data, settings, seed, after_state=after_state)
    batches = MicroBatches(cut, settings.micro_batch, settings.accumulate, cut.before(1))
    module = training(model, settings)
    for i in range(len(batches)):
        yield batches[i], module.training_step(batches[i], i) / settings.accumulate


def alone(model, tokens, targets, weights):
    """The weighted sum of one document's losses, by plain operations."""
    features, _ = model.features(torch.tensor([tokens]))
    logits = (features[0] @ model.head.weight.T).log_softmax(-1)
    return -sum(w * logits[i, t] for i, (t, w) in enumerate(zip(targets, weights, strict=True)) if w)


def by_document(model, data, *, after_state=False):
    """Sum of the weighted losses of all documents, each on its own, and the sum of the weights."""
    total = weight = 0.0
    for i in range(len(data)):
        tokens = data[i].tolist() if after_state else [0, *data[i].tolist()]
        w = [data.weight(i) * float(x) for x in data.learned(i)][int(after_state) :]
        total = total + alone(model, tokens[:-1], tokens[1:], w)
        weight += sum(w)
    return total, weight


def in_float64(version):
    """A small model, and its states too."""
    model = make(version=version, n_layer=2, vocab_size=128, op="reference").double()
    plain = model.initial_state
    model.initial_state = lambda batch: [BlockState(*(x.double() for x in block)) for block in plain(batch)]
    return model


@pytest.fixture(params=VERSIONS)
def exact(request):
    return in_float64(request.param)


def gradients(model, loss):
    for p in model.parameters():
        p.grad = None
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("version", "after_state"), [*((v, False) for v in VERSIONS), *((v, True) for v in VERSIONS if v != "4")]
)
def test_a_packed_row_has_the_gradients_of_its_documents_alone(version, after_state):
    """Exact: each is read from the state before a document, tuned or not, whatever stands beside it."""
    exact = in_float64(version)
    if after_state:
        give(exact, "wkv and token shift")
        for name, p in exact.named_parameters():
            if name.endswith("_state"):
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
        exact.double()
    data = documents(SIZES, masks=MASKS, weights=WEIGHTS)
    settings = config("pack", 24, micro_batch=8)
    ((batch, loss),) = steps(exact, data, settings, after_state=after_state)
    assert 1 < len(batch.groups) < len(SIZES)
    want, weight = by_document(exact, data, after_state=after_state)
    assert batch.step_weight == weight
    assert loss.item() == pytest.approx(want.item() / weight, rel=1e-9)
    ours, theirs = gradients(exact, loss), gradients(exact, want / weight)
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    assert any(x.abs().max() > 1e-3 for x in theirs.values())


@pytest.mark.parametrize("mode", ["pack, carried", "chunk, carried"])
def test_a_carried_state_makes_windows_the_whole(mode, exact):
    """Three windows of a document in turn, or documents of one row: the losses are those of one long document."""
    if mode == "pack, carried":
        data, settings = documents([7, 5, 8]), config("pack", 20, carry_state=True, order="as_given")
        tokens = [0, *itertools.chain.from_iterable(data[i].tolist() for i in range(3))]
    else:
        data, settings = documents([20]), config("chunk", 8, carry_state=True)
        tokens = [0, *data[0].tolist()]
    total = sum(loss.item() * batch.step_weight for batch, loss in steps(exact, data, settings))
    assert total == pytest.approx(alone(exact, tokens[:-1], tokens[1:], [1.0] * 20).item(), rel=1e-6)


def test_without_carrying_a_window_begins_from_nothing(exact):
    data = documents([20])
    found = [
        loss.item() * batch.step_weight for batch, loss in steps(exact, data, config("chunk", 8, order="as_given"))
    ]
    tokens = [0, *data[0].tolist()]
    for i, loss in enumerate(found):
        window = slice(8 * i, 8 * i + 9)
        part = tokens[window]
        assert loss == pytest.approx(alone(exact, part[:-1], part[1:], [1.0] * (len(part) - 1)).item(), rel=1e-9)
    assert len(found) == 3


def test_no_gradient_goes_through_a_carried_state(exact):
    """The second window's is that of its own tokens, from the first one's last state as it is."""
    data = documents([16])
    (_, _), (_, second) = steps(exact, data, config("chunk", 8, carry_state=True))
    tokens = torch.tensor([[0, *data[0].tolist()]])
    ours = gradients(exact, second)
    with torch.no_grad():
        _, state = exact.features(tokens[:, :8])
    logits = (exact.features(tokens[:, 8:16], state)[0][0] @ exact.head.weight.T).log_softmax(-1)
    theirs = gradients(exact, -logits[range(8), tokens[0, 9:17]].mean())
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-5, atol=1e-8)


def test_a_tuned_state_learns_from_where_documents_begin_alone(random_model):
    """Of documents that go on in lanes, from the first windows; lanes whose documents begin anew, begin from it."""
    model = random_model(n_layer=2, vocab_size=128)
    give(model, "wkv")
    data, settings = documents([21, 9, 3]), config("chunk", 8, carry_state=True, micro_batch=2)
    had = []
    for batch, loss in steps(model, data, settings, after_state=True):
        grads = gradients(model, loss)
        begins = any(not x for group in batch.groups for x in group.goes_on.tolist())
        assert bool(grads["blocks.0.att.time_state"].any()) is begins
        had.append(begins)
    assert had.count(True) == 2
    assert had.count(False) >= 1


@pytest.mark.parametrize("mode", ["stream", "pad", "pack", "chunk"])
def test_the_loss_is_the_weighted_mean_however_a_step_is_cut_up(mode, random_model):
    data = documents(SIZES, masks=MASKS, weights=WEIGHTS)
    model = random_model(n_layer=2, vocab_size=128)
    found = []
    for micro_batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        settings = config(mode, 8 if mode != "pack" else 17, micro_batch=micro_batch, accumulate=accumulate)
        by_step = {}
        for i, (batch, loss) in enumerate(steps(model, data, settings)):
            one = by_step.setdefault(i // accumulate, [0.0, batch.step_weight])
            one[0] += loss.item()
            assert one[1] == batch.step_weight
        found.append(by_step)
    for by_step in found[1:]:
        assert by_step.keys() == found[0].keys()
        for step, pair in by_step.items():
            assert pair == pytest.approx(found[0][step], rel=1e-5)
    if mode == "pack":
        want, weight = by_document(model, data)
        total = sum(loss * w for loss, w in found[0].values())
        assert total / weight == pytest.approx(want.item() / weight, rel=1e-5)


@pytest.mark.parametrize("mode", ["stream", "pad", "pack", "chunk", "chunk, carried"])
def test_what_has_nothing_to_learn_contributes_nothing(mode, random_model):
    """Micro-batches, steps and lanes of that kind: zeros, and no NaN."""
    rows_, _, carried = mode.partition(", ")
    data = documents([20, 4, 4], masks=[[False] * 20, [False] * 4, [True] * 4])
    settings = config(rows_, 5, micro_batch=1, accumulate=2, carry_state=bool(carried))
    model = random_model(n_layer=2, vocab_size=128)
    empty = learned = 0
    for batch, loss in steps(model, data, settings):
        grads = gradients(model, loss)
        assert all(x.isfinite().all() for x in grads.values())
        if not batch.learned:
            assert loss.item() == 0
            assert not any(x.any() for x in grads.values())
        else:
            assert loss.item() > 0
        empty, learned = empty + (not batch.groups), learned + batch.learned
    assert learned == 4
    assert bool(empty) is bool(carried), "a lane has run out"


def test_weights_of_one_change_no_bit(random_model):
    """None is given to the head where all are 1, and equal weights of any size are the same mean."""
    model = random_model(n_layer=2, vocab_size=128)
    found = []
    for weights in (None, [1.0] * 8, [4.0] * 8):
        data = documents(SIZES, weights=weights)
        (_, loss), *_ = steps(model, data, config("stream", 16, micro_batch=4))
        found.append(loss.item())
    assert found[0] == found[1]
    assert found[2] == pytest.approx(found[0], rel=1e-6)


def test_masked_tokens_are_read():
    """They stand among the inputs, and are no target."""
    data = documents(SIZES, masks=MASKS)
    cut = rows(data, config("pad", 32), None)
    batches = MicroBatches(cut, 8, 1, 8)
    (group,) = batches[0].groups
    for i, size in enumerate(SIZES):
        assert group.inputs[i, 1:size].tolist() == data[i].tolist()[:-1]
        assert (group.targets[i, :size] != IGNORE).tolist() == MASKS[i]


def test_held_out_rows_of_which_nothing_is_learned_have_no_loss():
    data = documents([6, 4], masks=[[False] * 6, [False] * 4])
    settings = config("pad", 8, validate_rows=2)
    module = training(make(), settings)
    module.trainer = pl.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    batches = MicroBatches(rows(data, settings, None), 2, 1, 2)
    with pytest.raises(InputError, match="none of their tokens is learned"):
        module.held_out_loss([batches[0]])
