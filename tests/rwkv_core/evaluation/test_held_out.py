import math
import os
import subprocess
import sys
import time
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import scores_of

from rwkv_core import checkpoint
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.data.whole import Source
from rwkv_core.errors import InputError
from rwkv_core.evaluation.held_out import (
    _BATCH,
    by_position,
    by_source,
    compare,
    ends,
    held_out_prompts,
    score,
    together,
)
from rwkv_core.evaluation.measure import FEWEST
from rwkv_core.evaluation.store import Journal, Store
from rwkv_core.evaluation.subject import Subject
from rwkv_core.models.state import BlockState, mount
from rwkv_core.tokenizer import Tokenizer, named, world

TABLE = [b"", *(bytes([96 + i % 26 + 1]) * (1 + i % 3) for i in range(63))]
LETTERS = Tokenizer(TABLE, lambda text: [])


@pytest.fixture
def documents(tmp_path):
    generator = torch.Generator().manual_seed(0)
    writer = Writer(tmp_path / "valid")
    for size in (1, 40, 3, 17, 16, 33, 2, 8):
        writer.add([*torch.randint(1, 64, (size,), generator=generator).tolist(), 0])
    writer.close()
    return Documents(tmp_path / "valid")


def test_score_is_that_of_one_token_after_the_other(tiny, documents):
    """In float64, without batches, slices, or the fused loss."""
    scores = score(tiny.eval(), documents, LETTERS, ctx_len=7, batch=3)
    exact = tiny.double()
    for i in range(len(documents)):
        state = [BlockState(*(x.double() for x in block)) for block in exact.initial_state(1)]
        previous, nats = 0, 0.0
        for token in documents[i].tolist():
            with torch.no_grad():
                logits, state = exact(torch.tensor([[previous]]), state)
            nats -= torch.log_softmax(logits[0, 0], 0)[token].item()
            previous = token
        assert scores.nats[i] == pytest.approx(nats, rel=1e-5)
        assert scores.tokens[i] == len(documents[i])
        assert scores.bytes[i] == sum(len(TABLE[token]) for token in documents[i].tolist())


def tuned_of(model):
    """A tuned state with everything that it can have."""
    generator = torch.Generator().manual_seed(4)
    state = {}
    for i in range(model.config.n_layer):
        state[f"blocks.{i}.att.time_state"] = torch.randn(4, 8, 8, generator=generator)
        state |= {f"blocks.{i}.{part}.ts_state": torch.randn(32, generator=generator) for part in ("att", "ffn")}
    return state


def test_after_a_state_both_models_are_scored_on_the_same_tokens(tiny, documents):
    """One token after the other: the base after token 0, the tuned model after the state, and neither on the first token."""
    state = tuned_of(tiny)
    sizes = {"ctx_len": 7, "batch": 3}
    tuned = score(tiny.eval(), documents, LETTERS, state=state, **sizes)
    base = score(tiny, documents, LETTERS, skip_first=True, **sizes)
    whole = score(tiny, documents, LETTERS, **sizes)
    for i in range(len(documents)):
        tokens = documents[i].tolist()
        with torch.no_grad():
            after_state, _ = tiny(torch.tensor([tokens]), mount(tiny.initial_state(1), state))
            after_zero, _ = tiny(torch.tensor([[0, *tokens]]))
        for scores, logits in ((tuned, after_state[0, :-1]), (base, after_zero[0, 1:-1])):
            want = -torch.log_softmax(logits.double(), -1)[range(len(tokens) - 1), tokens[1:]].sum().item()
            assert scores.nats[i] == pytest.approx(want, rel=1e-5)
            assert scores.tokens[i] == len(tokens) - 1
            assert scores.bytes[i] == sum(len(TABLE[token]) for token in tokens[1:])
    assert (whole.nats > base.nats).all()
    assert np.abs(tuned.nats - base.nats).min() > 0.01


@pytest.mark.parametrize(("ctx_len", "batch"), [(1, 1), (5, 8), (1000, 100)])
def test_score_after_a_state_does_not_depend_on_how_it_is_cut(ctx_len, batch, tiny, documents):
    one = score(tiny.eval(), documents, LETTERS, ctx_len=8, batch=4, state=tuned_of(tiny))
    other = score(tiny, documents, LETTERS, ctx_len=ctx_len, batch=batch, state=tuned_of(tiny))
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


@pytest.mark.parametrize("skip_first", [False, True])
def test_masked_tokens_are_read_and_not_scored(skip_first, tiny, documents, monkeypatch):
    """Loss and bytes are those of the learned tokens, after all that stands before them."""
    masks = [np.arange(len(documents[i])) % 3 == i % 3 for i in range(len(documents))]
    masks[3][:] = False
    whole = score(tiny.eval(), documents, LETTERS, ctx_len=7, batch=3)
    monkeypatch.setattr(Documents, "learned", lambda self, i: masks[i])
    scores = score(tiny, documents, LETTERS, ctx_len=7, batch=3, skip_first=skip_first)
    for i in range(len(documents)):
        tokens, mask = documents[i].tolist(), masks[i].copy()
        mask[:skip_first] = False
        with torch.no_grad():
            logits = tiny(torch.tensor([[0, *tokens[:-1]]]))[0][0].double()
        nll = -torch.log_softmax(logits, -1)[range(len(tokens)), tokens].numpy()
        assert scores.nats[i] == pytest.approx(nll[mask].sum(), rel=1e-5)
        assert scores.tokens[i] == mask.sum()
        assert scores.bytes[i] == sum(len(TABLE[t]) for t, learned in zip(tokens, mask, strict=True) if learned)
    assert scores.tokens[3] == scores.nats[3] == 0
    assert whole.tokens[3] > 0


def test_documents_without_a_learned_token_are_left_out_and_counted(some):
    losses, tokens = some
    some_tokens = np.where(np.arange(60) % 5 == 0, 0, tokens)
    scored = some_tokens > 0
    result = judge(scores(losses, some_tokens), scores(0.9 * losses, some_tokens))
    alone = judge(scores(losses[scored], tokens[scored]), scores(0.9 * losses[scored], tokens[scored]))
    assert (result["documents"], result["documents_not_scored"]) == (48, 12)
    assert {**result, "documents_not_scored": 0} == alone
    with pytest.raises(InputError, match="60 held-out documents: none has a token that is learned"):
        judge(scores(losses, 0 * tokens), scores(losses, 0 * tokens))


@pytest.mark.parametrize(("ctx_len", "batch"), [(1, 1), (5, 8), (16, 2), (1000, 3), (1000, 100)])
def test_score_does_not_depend_on_how_it_is_cut(ctx_len, batch, tiny, documents):
    tiny.eval()
    one = score(tiny, documents, LETTERS, ctx_len=8, batch=4)
    other = score(tiny, documents, LETTERS, ctx_len=ctx_len, batch=batch)
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_score_says_how_far_it_is(tiny, documents):
    said = []
    score(tiny.eval(), documents, LETTERS, ctx_len=8, batch=3, progress=lambda *done: said.append(done))
    assert said == sorted(said)
    assert {all_of for _, all_of in said} == {8}
    assert said[-1] == (8, 8)
    assert all(0 < here - before <= 3 for (before, _), (here, _) in pairwise([(0, 8), *said]))


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_batches_are_the_cheapest_of_all_ways_to_cut(most):
    rng = np.random.default_rng(most)

    def cost(cuts):
        return sum((stop - start) * int(sizes[start]) + _BATCH for start, stop in pairwise(cuts))

    for _ in range(30):
        sizes = np.sort(rng.integers(1, 200, rng.integers(1, 9)))[::-1]
        inner = range(1, len(sizes))
        ways = [[0, *some, len(sizes)] for k in range(len(sizes)) for some in combinations(inner, k)]
        allowed = [cuts for cuts in ways if max(np.diff(cuts)) <= most]
        cuts = together(sizes, most)
        assert cuts in allowed
        assert cost(cuts) == min(map(cost, allowed))


def test_batches_of_documents_of_one_length_are_full():
    assert together(np.full(10, 300), 4) in ([0, 4, 8, 10], [0, 2, 6, 10], [0, 4, 6, 10])
    assert together(np.array([], np.int64), 4) == [0]


def test_bits_per_byte_by_hand():
    scores = scores_of([4.0, 2.0], [2.0, 1.0], [3.0, 5.0])
    summary = scores.summary()
    assert summary["loss"] == 2.0
    assert summary["perplexity"] == pytest.approx(math.e**2)
    assert summary["bits_per_byte"] == pytest.approx(6 / math.log(2) / 8)


def test_a_hopeless_model_has_a_perplexity():
    assert math.isfinite(scores_of([1e6], [1.0], [1.0]).summary()["perplexity"])


def scores(losses, tokens):
    return scores_of(losses * tokens, tokens, 4 * tokens)


@pytest.fixture
def some():
    rng = np.random.default_rng(0)
    return rng.normal(3, 1, 60).clip(0.5), rng.integers(5, 200, 60).astype(float)


def judge(base, tuned, **changes):
    return compare(base, tuned, **({"resamples": 500, "confidence": 0.95, "seed": 1} | changes))


def test_the_same_model_is_not_better(some):
    one = scores(*some)
    result = judge(one, one)
    assert result["better"] == 0
    assert result["base"] == result["tuned"] == one.summary()
    assert result["change"] == {m: {"value": 0, "low": 0, "high": 0} for m in ("loss", "perplexity", "bits_per_byte")}
    assert (result["documents"], result["tokens"], result["confidence"]) == (60, int(some[1].sum()), 0.95)


def test_a_handful_scores_of_gives_no_verdict(some):
    losses, tokens = (x[: FEWEST - 1] for x in some)
    result = judge(scores(losses, tokens), scores(0.5 * losses, tokens))
    assert result["change"]["loss"]["high"] < 0
    assert result["better"] == 0


@pytest.mark.parametrize(("factor", "better"), [(0.95, 1), (1.05, -1)])
def test_a_uniform_change_is_seen(factor, better, some):
    losses, tokens = some
    result = judge(scores(losses, tokens), scores(factor * losses, tokens))
    assert result["better"] == better
    for change in result["change"].values():
        assert change["low"] <= change["value"] <= change["high"]
        assert change["high"] * better < 0
        assert change["low"] * better < 0
    mean = (losses * tokens).sum() / tokens.sum()
    assert result["change"]["loss"]["value"] == pytest.approx((factor - 1) * mean)


def test_documents_of_their_own_difficulty_do_not_hide_a_change(some):
    """Drawn separately, losses that differ by 1 between documents would drown a change of 0.02; drawn in pairs, not."""
    losses, tokens = some
    noise = np.random.default_rng(1).normal(0, 0.02, 60)
    assert judge(scores(losses, tokens), scores(losses - 0.02 + noise, tokens))["better"] == 1


def test_the_interval_follows_the_seed_and_the_confidence(some):
    losses, tokens = some
    base, tuned = scores(losses, tokens), scores(losses + np.random.default_rng(1).normal(0, 0.3, 60), tokens)
    assert judge(base, tuned) == judge(base, tuned)
    assert judge(base, tuned, seed=2)["change"] != judge(base, tuned)["change"]
    wide, narrow = (judge(base, tuned, confidence=c)["change"]["loss"] for c in (0.99, 0.6))
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]


def test_held_out_prompts(tmp_path):
    writer = Writer(tmp_path / "valid")
    for i in range(20):
        text = f"User: {i}?\n\nAssistant: {i}.\n\nUser: again\n\nAssistant: no" if i % 2 else f"prose {i}"
        writer.add([*world().encode(text), 0])
    writer.close()
    documents = Documents(tmp_path / "valid")
    prompts = [f"User: {i}?\n\nAssistant:" for i in range(1, 20, 2)]
    assert held_out_prompts(documents, world(), 10) == prompts
    assert held_out_prompts(documents, world(), 99) == prompts
    assert held_out_prompts(documents, world(), 5) == prompts[::2]
    assert held_out_prompts(documents, world(), 0) == []
    assert held_out_prompts(documents, world(), 3, marker="prose") == ["prose"] * 3
    assert held_out_prompts(documents, world(), 3, marker="nowhere") == []


def test_perplexity_is_that_of_torchmetrics(tiny, documents, monkeypatch):
    """On the tokens that a mask has, of documents side by side."""
    from torchmetrics.text import Perplexity

    masks = [np.arange(len(documents[i])) % 4 != 1 for i in range(len(documents))]
    monkeypatch.setattr(Documents, "learned", lambda self, i: masks[i])
    scores = score(tiny.eval(), documents, LETTERS, ctx_len=7, batch=3)
    metric = Perplexity(ignore_index=-100)
    for i, mask in enumerate(masks):
        tokens = torch.from_numpy(documents[i].astype(np.int64))
        with torch.no_grad():
            logits = tiny(torch.cat([torch.zeros(1, dtype=torch.int64), tokens[:-1]])[None])[0]
        metric.update(logits, torch.where(torch.from_numpy(mask), tokens, -100)[None])
    assert scores.summary()["perplexity"] == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.parametrize("after_state", [False, True])
@pytest.mark.parametrize("ctx_len", [7, 16, 1000])
def test_loss_by_position_is_that_of_the_tokens_there(after_state, ctx_len, tiny, documents, monkeypatch):
    masks = [np.arange(len(documents[i])) % 5 != i % 5 for i in range(len(documents))]
    monkeypatch.setattr(Documents, "learned", lambda self, i: masks[i])
    state = tuned_of(tiny) if after_state else None
    scores = score(tiny.eval(), documents, LETTERS, ctx_len=ctx_len, batch=3, state=state)
    nats, tokens = np.zeros((len(documents), 3)), np.zeros((len(documents), 3))
    for i, mask in enumerate(masks):
        ids = documents[i].tolist()
        with torch.no_grad():
            begin = mount(tiny.initial_state(1), state) if state else None
            logits = tiny(torch.tensor([ids if after_state else [0, *ids]]), begin)[0][0].double()
        for at in range(int(after_state), len(ids)):
            if mask[at]:
                nll = -torch.log_softmax(logits[at - after_state], -1)[ids[at]].item()
                nats[i, (at >= 16) + (at >= 32)] += nll
                tokens[i, (at >= 16) + (at >= 32)] += 1
    np.testing.assert_allclose(scores.nats_by_position, nats, rtol=1e-5)
    np.testing.assert_array_equal(scores.tokens_by_position, tokens)
    np.testing.assert_array_equal(scores.tokens, tokens.sum(1))
    worse = scores._replace(nats_by_position=scores.nats_by_position + 0.5 * tokens)
    rows = by_position(scores, worse, resamples=100, confidence=0.95, seed=0)
    assert [(row["from"], row["to"], row["tokens"]) for row in rows] == [
        (begin, end, tokens[:, i].sum()) for i, (begin, end) in enumerate([(1, 16), (17, 32), (33, 64)])
    ]
    for i, row in enumerate(rows):
        assert row["base_loss"] == pytest.approx(nats[:, i].sum() / tokens[:, i].sum(), rel=1e-5)
        assert (row["change"], row["low"], row["high"]) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("longest", "wanted"), [(1, [16]), (16, [16]), (17, [16, 32]), (32, [16, 32]), (33, [16, 32, 64])]
)
def test_where_positions_end(longest, wanted):
    assert ends(longest) == wanted


def test_loss_by_source(some):
    losses, tokens = some
    parts = [Source("a", 0, 10), Source("none", 10, 0), Source("b", 10, 50)]
    found = by_source(scores(losses, tokens), parts)
    assert list(found) == ["a", "b"]
    assert found["a"].mean() == pytest.approx((losses * tokens)[:10].sum() / tokens[:10].sum())
    assert found["b"].mean() == pytest.approx((losses * tokens)[10:].sum() / tokens[10:].sum())


def test_documents_that_are_left_out_count_for_nothing(some):
    losses, tokens = some
    left_out = np.arange(60) % 3 == 0
    without = scores(losses, tokens).without(left_out)
    assert without.summary() == pytest.approx(scores(losses[~left_out], tokens[~left_out]).summary())
    assert without.tokens_by_position[left_out].sum() == without.nats_by_position[left_out].sum() == 0


def test_scoring_goes_on_after_the_batches_that_are_known(tiny, documents):
    """With the same numbers, to the bit; and where all are known, without a model."""
    sizes = {"ctx_len": 7, "batch": 3}
    whole = Journal()
    wanted = score(tiny.eval(), documents, LETTERS, journal=whole, **sizes)
    loaded = []
    for done in range(len(whole.pieces) + 1):
        scores = score(
            lambda: loaded.append(1) or tiny, documents, LETTERS, journal=Journal(pieces=whole.pieces[:done]), **sizes
        )
        for x, y in zip(scores, wanted, strict=True):
            np.testing.assert_array_equal(x, y)
    assert len(loaded) == len(whole.pieces)  # not the last time


KILLED = """
import sys
from pathlib import Path
import torch

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_held_out import scored_in

scored_in(Path("killed"))
"""


def scored_in(folder):
    subject = Subject(Path("model.pth"), named("bytes", {}), store=Store(folder))
    return subject.score(Documents(Path("text")), ctx_len=16, batch=2)


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on_to_the_same_bytes(tmp_path, random_model, monkeypatch):
    """By SIGKILL, twice, whatever it is at."""
    checkpoint.write(tmp_path / "model.pth", random_model(vocab_size=256).state_dict())
    draw, writer = np.random.default_rng(0), Writer(tmp_path / "text")
    for _ in range(500):
        writer.add([*draw.integers(1, 256, draw.integers(1, 60)).tolist(), 0])
    writer.close()
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    lines = []
    for wait in draw.uniform(0, 0.2, 2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(Path(__file__).parent)], env=environment)
        found = lambda: [path.read_bytes().count(b"\n") for path in Path("killed").glob("*.jsonl")]  # noqa: E731
        while process.poll() is None and sum(found()) <= max(lines, default=0):
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        process.wait()
        lines += found()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scores, undisturbed = (scored_in(Path(folder)) for folder in ("killed", "whole"))
    torch.set_num_threads(threads)
    killed, whole = (next(Path(folder).iterdir()) for folder in ("killed", "whole"))
    assert lines == sorted(lines)
    assert 1 < lines[0] < whole.read_bytes().count(b"\n"), lines
    assert killed.name == whole.name
    assert killed.read_bytes() == whole.read_bytes()
    for x, y in zip(scores, undisturbed, strict=True):
        np.testing.assert_array_equal(x, y)
