import numpy as np
import pytest
import torch
from random_models import make

from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.errors import InputError
from rwkv_core.evaluation.held_out import score
from rwkv_core.models.state import unmount
from rwkv_core.state_lab.compare import leaderboard
from rwkv_core.state_lab.text import from_text
from rwkv_core.tokenizer import bytes_tokenizer

TOKENS = bytes_tokenizer()
HOW = {"ctx_len": 16, "batch": 4, "resamples": 300, "confidence": 0.95, "seed": 0}


@pytest.fixture(scope="module")
def model():
    return make(vocab_size=256).eval().requires_grad_(False)


@pytest.fixture
def documents(model, tmp_path):
    """What the model says after "good": that state foresees it."""
    writer = Writer(tmp_path / "valid")
    generator = torch.Generator().manual_seed(0)
    for _ in range(14):
        state, said = from_text(model, TOKENS, "good").state, []
        logits = torch.zeros(1, 256)
        for _ in range(12):
            token = int(torch.multinomial(torch.softmax(2 * logits, -1), 1, generator=generator))
            said.append(token)
            x, state = model(torch.tensor([[token]]), state)
            logits = x[:, 0]
        writer.add([*said, 0])
    writer.close()
    return Documents(tmp_path / "valid")


def states(model):
    good = unmount(from_text(model, TOKENS, "good").state)
    bad = {name: 30 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for name, x in good.items()}
    return {"good": good, "twin": good, "bad": bad}


def test_the_best_is_first_and_every_number_is_that_of_score(model, documents):
    board = leaderboard(model, documents, TOKENS, states(model), **HOW)
    assert [one.name for one in board] == ["good", "twin", "none", "bad"]
    by_name = {one.name: one for one in board}
    for name, state in {"none": None, **states(model)}.items():
        summary = score(model, documents, TOKENS, ctx_len=16, batch=4, state=state, skip_first=True).summary()
        one = by_name[name]
        assert (one.loss, one.perplexity, one.bits_per_byte) == tuple(summary.values())
        assert one.from_none["value"] == pytest.approx(one.loss - by_name["none"].loss)
        assert one.from_best["value"] == pytest.approx(one.loss - by_name["good"].loss)


def test_the_intervals_say_who_is_better(model, documents):
    by_name = {one.name: one for one in leaderboard(model, documents, TOKENS, states(model), **HOW)}
    assert {name: one.better for name, one in by_name.items()} == {"good": 1, "twin": 1, "none": 0, "bad": -1}
    assert {name: one.behind for name, one in by_name.items()} == {
        "good": False, "twin": False, "none": True, "bad": True,
    }  # fmt: skip
    good = by_name["good"]
    assert good.from_none["low"] < good.from_none["value"] < good.from_none["high"] < 0
    assert set(good.from_best.values()) == set(by_name["twin"].from_best.values()) == {0.0}


def test_a_state_of_another_model_is_refused(model, documents):
    wrong = {f"blocks.{i}.att.time_state": torch.zeros(2, 16, 16) for i in range(3)}
    with pytest.raises(InputError, match="give a state tuned on this model"):
        leaderboard(model, documents, TOKENS, {"wrong": wrong}, **HOW)


def test_documents_without_a_second_token_are_refused(model, tmp_path):
    writer = Writer(tmp_path / "short")
    for _ in range(3):
        writer.add(np.array([5], np.uint16))
    writer.close()
    with pytest.raises(InputError, match="3 documents: none has a token to score"):
        leaderboard(model, Documents(tmp_path / "short"), TOKENS, {}, **HOW)
