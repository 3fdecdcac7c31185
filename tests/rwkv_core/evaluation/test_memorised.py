"""What a model recites, against greedy decoding token by token."""

import numpy as np
import pytest
import torch
from random_models import make

from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.evaluation.likelihood import Reader
from rwkv_core.evaluation.memorised import passages, recited
from rwkv_core.tokenizer import bytes_tokenizer

PROMPT, CONTINUATION = 5, 4


def decoded(model, tokens, count):
    """Greedily, after token 0 and these, one at a time."""
    tokens = [0, *tokens]
    for _ in range(count):
        with torch.no_grad():
            logits, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[-count:]


@pytest.fixture
def model():
    return make(seed=2).eval()


@pytest.fixture
def documents(model, tmp_path):
    """Even ones are known by heart, of odd ones the last token is another; and some are too short."""
    rng, writer = np.random.default_rng(0), Writer(tmp_path / "train")
    for i in range(12):
        begin = rng.integers(1, 64, PROMPT).tolist()
        known = decoded(model, begin, CONTINUATION)
        if i % 2:
            known[-1] = known[-1] % 63 + 1
        writer.add([*begin, *known, *rng.integers(1, 64, i).tolist(), 0])
        writer.add([*begin, *known[:-2], 0])
    writer.close()
    return Documents(tmp_path / "train")


def reader(model):
    return Reader(model, bytes_tokenizer(), ctx_len=3, batch=4)


def test_the_share_is_of_continuations_that_greedy_decoding_writes(model, documents):
    asked = passages(documents, count=100, prompt=PROMPT, continuation=CONTINUATION, seed=0)
    wanted = [tuple(decoded(model, pair.context, CONTINUATION)) == pair.continuation for pair in asked]
    items = recited(reader(model), asked)["verbatim"]
    assert items.total.tolist() == wanted
    assert items.mean() == 0.5
    assert not items.higher_is_better


def test_short_documents_are_left_out_and_the_draw_is_the_seed_s(model, documents):
    sizes = {"prompt": PROMPT, "continuation": CONTINUATION}
    assert len(passages(documents, count=100, seed=0, **sizes)) == 12
    some = passages(documents, count=5, seed=0, **sizes)
    assert len(set(some)) == 5
    assert some == passages(documents, count=5, seed=0, **sizes) != passages(documents, count=5, seed=1, **sizes)
    assert recited(reader(model), passages(documents, count=5, prompt=90, continuation=10, seed=0)) == {}
