"""How likely a continuation is, against the model read one token after the other, alone, in float64."""

import numpy as np
import pytest
import torch
from random_models import VERSIONS, make

from rwkv_core.evaluation import likelihood as module
from rwkv_core.evaluation.likelihood import Pair, Reader, encode_pair, likelihoods
from rwkv_core.models.state import BlockState, mount
from rwkv_core.tokenizer import Tokenizer, greedy_encoder, world

LETTERS = Tokenizer([b"", *(bytes([31 + i]) for i in range(1, 64))], lambda text: [ord(c) - 31 for c in text])


def reader(model, **changes):
    return Reader(**{"model": model.eval(), "tokenizer": LETTERS, "ctx_len": 7, "batch": 3} | changes)


def tuned(model):
    generator = torch.Generator().manual_seed(4)
    return {
        f"blocks.{i}.att.time_state": torch.randn(4, 8, 8, generator=generator) for i in range(model.config.n_layer)
    }


def alone(model, pair, state=None, skip_first=False):
    """(nats, tokens, greedy) of one continuation."""
    exact = make(version=model.config.version).double() if model.config.version != "7" else make().double()
    begin = exact.initial_state(1)
    if state is not None:
        begin = [BlockState(*(x.double() for x in block)) for block in mount(model.initial_state(1), state)]
    text = [*([] if state is not None else [0]), *pair.context, *pair.continuation]
    with torch.no_grad():
        logits, _ = exact(torch.tensor([text]), begin)
    log_p = torch.log_softmax(logits[0], -1)
    first = len(text) - len(pair.continuation)
    if not pair.context and (state is not None or skip_first):
        first += 1
    places = range(first, len(text))
    nats = -sum(log_p[i - 1, text[i]].item() for i in places)
    return nats, len(places), all(log_p[i - 1].argmax() == text[i] for i in places)


def some_pairs(seed=0):
    """Choices of questions, questions without a context, long ones, and two families that share a long beginning."""
    rng = np.random.default_rng(seed)

    def tokens(n):
        return tuple(rng.integers(1, 64, n).tolist())

    pairs = []
    for length in (1, 5, 5, 20, 33):
        context = tokens(length)
        pairs += [Pair(context, tokens(n)) for n in (1, 4, 1, 17)]
    for examples in (tokens(70), tokens(90)):
        for length in (1, 3, 9):
            context = examples + tokens(length)
            pairs += [Pair(context, tokens(n)) for n in (2, 1)]
        pairs.append(Pair(examples, tokens(3)))
    pairs += [Pair((), tokens(n)) for n in (1, 2, 30)]
    return [pairs[i] for i in rng.permutation(len(pairs))]


@pytest.mark.parametrize("version", VERSIONS)
def test_likelihoods_are_those_of_each_continuation_by_itself(version):
    model = make(version=version)
    pairs = some_pairs()
    found = likelihoods(reader(model), pairs)
    wanted = [alone(model, pair) for pair in pairs]
    np.testing.assert_allclose(found.nats, [nats for nats, _, _ in wanted], rtol=1e-4)
    assert found.tokens.tolist() == [tokens for _, tokens, _ in wanted]
    assert found.greedy.tolist() == [greedy for _, _, greedy in wanted]


def test_what_greedy_decoding_writes_is_found_greedy(tiny):
    asked = reader(tiny, ctx_len=4)
    prompts = ["ABCDE", "QRSTUVWX", "A", "B" * 20]
    written = asked.answers(prompts, max_tokens=6)
    pairs = [
        Pair(tuple(LETTERS.encode(p)), tuple(LETTERS.encode(a.text))) for p, a in zip(prompts, written, strict=True)
    ]
    assert all(len(pair.continuation) > 3 for pair in pairs)
    assert likelihoods(asked, pairs).greedy.all()
    last = [pair._replace(continuation=(*pair.continuation[:-1], 1 + pair.continuation[-1] % 60)) for pair in pairs]
    first = [pair._replace(continuation=(1 + pair.continuation[0] % 60, *pair.continuation[1:])) for pair in pairs]
    assert not likelihoods(asked, last + first).greedy.any()


@pytest.mark.parametrize("with_state", [True, False])
def test_after_a_state_the_first_token_of_a_text_is_not_scored(with_state, tiny):
    state = tuned(tiny) if with_state else None
    begin = mount(tiny.initial_state(1), state) if state else None
    pairs = some_pairs(1)
    found = likelihoods(reader(tiny, begin=begin, skip_first=True), pairs)
    wanted = [alone(tiny, pair, state, skip_first=True) for pair in pairs]
    np.testing.assert_allclose(found.nats, [nats for nats, _, _ in wanted], rtol=1e-4)
    assert found.tokens.tolist() == [tokens for _, tokens, _ in wanted]
    assert found.tokens.min() == 0


@pytest.mark.parametrize(("ctx_len", "batch"), [(1, 1), (3, 8), (1000, 100)])
def test_likelihoods_do_not_depend_on_how_the_work_is_cut(ctx_len, batch, tiny):
    pairs = some_pairs()
    one, other = (likelihoods(reader(tiny, **sizes), pairs) for sizes in ({}, {"ctx_len": ctx_len, "batch": batch}))
    np.testing.assert_allclose(one.nats, other.nats, rtol=1e-4)
    assert (one.greedy == other.greedy).all()


def test_positions_are_judged_a_bounded_number_at_a_time(tiny, monkeypatch):
    pairs = some_pairs()
    whole = likelihoods(reader(tiny), pairs)
    monkeypatch.setattr(module, "_ROWS", 2)
    np.testing.assert_allclose(likelihoods(reader(tiny), pairs).nats, whole.nats, rtol=1e-5)


def test_what_pairs_have_in_common_is_read_once(tiny):
    """Ten questions of 4 choices behind the same 100 tokens: 100 + 10 * 20 + 40 * 4 tokens are read, not 40 * 125."""
    rng = np.random.default_rng(0)
    examples = tuple(rng.integers(1, 64, 99).tolist())
    questions = [examples + tuple(rng.integers(1, 64, 20).tolist()) for _ in range(10)]
    pairs = [Pair(question, tuple(rng.integers(1, 64, 5).tolist())) for question in questions for _ in range(4)]
    read, features = [], tiny.features

    def counted(tokens, state=None):
        read.append(tokens.numel())
        return features(tokens, state)

    tiny.features = counted
    likelihoods(reader(tiny, batch=8), pairs)
    assert sum(read) == 100 + 10 * 20 + 40 * 4


def test_the_seam_is_encoded_as_lm_eval_encodes_it():
    """Where the context's tokens are the beginning of those of the whole, the two are the same."""
    from lm_eval.api.model import TemplateLM

    theirs = type("Theirs", (), {"backend": "causal", "tok_encode": lambda self, text: world().encode(text)})()
    texts = [
        ("Question: What is it?\nAnswer:", " a cat"),
        ("Question: What is it?\nAnswer: ", "a cat"),
        ("It was the best of   ", "times"),
        ("问题：它是什么？\n答案：", "猫"),
        ("x", "\n\ny"),
        ("Where is", " the cat?\n"),
    ]
    for context, continuation in texts:
        assert tuple(map(tuple, TemplateLM._encode_pair(theirs, context, continuation))) == encode_pair(
            world(), context, continuation
        )


def test_a_token_across_the_seam_is_scored():
    """ "Assistant:" and "** A" have a token ":**" between them, which lm-eval would lose."""
    pair = encode_pair(world(), "Assistant:", "** A")
    assert world().decode(pair.context) == "Assistant"
    assert world().decode(pair.continuation) == ":** A"
    abc = greedy_encoder([b"", b"a", b"b", b"ab", b"abc", b"c"])
    assert encode_pair(Tokenizer([], abc), "ab", "c") == ((), (4,))


def test_of_equal_tokens_greedy_decoding_takes_the_first():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]]).expand(4, 4)
    nats, greedy = module._judged(logits, torch.arange(4))
    assert greedy.tolist() == [False, True, False, False]
    assert nats.tolist() == pytest.approx((-torch.log_softmax(logits[0].double(), 0)).tolist())
