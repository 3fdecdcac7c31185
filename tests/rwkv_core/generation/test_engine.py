"""Many texts at once: each is what it is alone, whoever comes and goes beside it."""

import queue
import threading
from dataclasses import replace

import pytest
import torch
from random_models import make

from rwkv_core.errors import InputError, WorldError
from rwkv_core.generation import engine as engines
from rwkv_core.generation.engine import Engine
from rwkv_core.generation.opened import Opened
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import generate
from rwkv_core.models.state import mount
from rwkv_core.tokenizer import Tokenizer

ASCII = Tokenizer([b"", *(bytes([i]) for i in range(1, 128))], lambda text: list(text.encode("ascii")))
DRAWN = Sampling(max_tokens=24, temperature=1.0, top_p=0.9, seed=3, presence_penalty=0.3, penalty_decay=0.9)
PATIENCE = 60.0


@pytest.fixture(scope="module")
def model():
    """One that never says token 0, so that its texts are as long as they may be."""
    model = make(vocab_size=128).eval().requires_grad_(False)
    model.head.weight.sub_(model.head.weight.mean(1, keepdim=True))
    model.head.weight[0] = -1.0
    model.ln_out.bias.add_(1.0)
    return model


def serve(model, *, rows=4, begin=None, cache=1 << 26):
    return Engine(Opened(model, ASCII, begin), rows=rows, cache_bytes=cache)


class Listener:
    """What one who asked was told."""

    def __init__(self):
        self.told = queue.Queue()

    def until_whole(self, count=1):
        """The continuations by their row, and their pieces put together."""
        whole, text = {}, {}
        while len(whole) < count:
            piece = self.told.get(timeout=PATIENCE)
            if isinstance(piece, Exception):
                raise piece
            text[piece.row] = text.get(piece.row, "") + piece.text
            if piece.whole is not None:
                whole[piece.row] = piece.whole
        assert {row: x.text for row, x in whole.items()} == text
        return whole


def asks(engine, prompt, sampling=DRAWN, rows=(0,)):
    listener = Listener()
    return listener, engine.ask(prompt, rows, sampling, listener.told.put)


def alone(model, prompt, sampling=DRAWN, row=0, begin=None):
    """What `generate` makes of it, as the row of that number."""
    return generate(model, ASCII, [prompt] * (row + 1), sampling, ctx_len=512, batch=1, states=[begin] * (row + 1))[row]


def test_an_answer_is_what_generate_gives(model):
    with serve(model) as engine:
        listener, asked = asks(engine, "Hello")
        [whole] = listener.until_whole().values()
    want = alone(model, "Hello")
    assert (whole.text, whole.ending, whole.tokens) == (want.text, want.ending, want.tokens)
    torch.testing.assert_close(whole.state, want.state, rtol=0, atol=0)
    assert asked.ids == [0, *b"Hello"]


def test_all_who_ask_at_once_get_what_they_get_alone(model):
    """Twelve of four lengths for three places: they join and leave at different times."""
    prompts = {i: ("x" * i * 40 + "abc")[: 7 + 40 * i] for i in range(12)}
    samplings = {i: replace(DRAWN, seed=i, max_tokens=5 + 7 * (i % 4)) for i in prompts}
    with serve(model, rows=3) as engine:
        listeners = {i: asks(engine, prompts[i], samplings[i])[0] for i in prompts}
        got = {i: listener.until_whole()[0] for i, listener in listeners.items()}
        most = engine.steps
    for i, prompt in prompts.items():
        want = alone(model, prompt, samplings[i])
        assert (got[i].text, got[i].ending) == (want.text, want.ending), i
    drawn = sum(len(whole.tokens) for whole in got.values())
    assert most < 0.6 * drawn, "they were answered one after the other"


def test_one_who_comes_later_joins_the_batch_that_runs(model):
    long = replace(DRAWN, max_tokens=100_000, seed=1, presence_penalty=0.0)
    with serve(model) as engine:
        first, asked = asks(engine, "Tell a story", long)
        first.told.get(timeout=PATIENCE)
        second, _ = asks(engine, "Hi" * 200)
        assert second.until_whole()[0].text == alone(model, "Hi" * 200).text
        while not first.told.empty():
            piece = first.told.get()
            assert piece.whole is None or piece.whole.ending == "end"
        asked.leave()


def test_nobody_waits_for_the_whole_of_anothers_prompt(model, monkeypatch):
    monkeypatch.setattr(engines, "_BESIDE", 8)
    slices, read = [], engines.read

    def noted(model, ids, state, ctx_len):
        slices.append((len(ids), engine.steps))
        return read(model, ids, state, ctx_len)

    monkeypatch.setattr(engines, "read", noted)
    with serve(model) as engine:
        first, asked = asks(engine, "abc", replace(DRAWN, max_tokens=100_000, temperature=0.0))
        first.told.get(timeout=PATIENCE)
        second, _ = asks(engine, "x" * 63)
        second.until_whole()
        asked.leave()
    (_, begun), *rest = slices[1:]
    assert [size for size, _ in slices[1:]] == [8] * 8
    assert [steps for _, steps in rest] == [begun + i for i in range(1, 8)], "a token for the first between two slices"


def test_several_continuations_of_one_prompt_read_it_once(model):
    with serve(model) as engine:
        listener, _ = asks(engine, "Once upon", rows=(0, 1, 2))
        got = listener.until_whole(3)
        assert engine.read_tokens == 1 + len("Once upon")
    assert [got[i].text for i in range(3)] == [alone(model, "Once upon", row=i).text for i in range(3)]
    assert len({whole.text for whole in got.values()}) == 3


def test_a_conversation_is_read_on_from_where_it_ended(model):
    with serve(model) as engine:
        text, known = "User: Hi\n\nAssistant:", 0
        for turn in range(3):
            before = engine.read_tokens
            listener, asked = asks(engine, text, replace(DRAWN, seed=turn))
            [whole] = listener.until_whole().values()
            want = alone(model, text, replace(DRAWN, seed=turn))
            assert whole.text == want.text
            torch.testing.assert_close(whole.state, want.state, rtol=1e-4, atol=1e-4)
            if turn:
                assert asked.known == known
                assert engine.read_tokens - before == len(asked.ids) - known == len("\n\nUser: more\n\nAssistant:")
            known = len(asked.ids) + len(whole.tokens)
            text += whole.read + "\n\nUser: more\n\nAssistant:"


def test_the_same_prompt_again_is_not_read_again(model):
    with serve(model) as engine:
        first = asks(engine, "Once upon")[0].until_whole()[0]
        read = engine.read_tokens
        listener, asked = asks(engine, "Once upon")
        assert listener.until_whole()[0].text == first.text
        assert engine.read_tokens == read
        assert asked.known == len(asked.ids)


def test_without_room_for_states_everything_is_read(model):
    with serve(model, cache=0) as engine:
        for _ in range(2):
            assert asks(engine, "Once upon")[0].until_whole()[0].text == alone(model, "Once upon").text
        assert engine.read_tokens == 2 * (1 + len("Once upon"))


def test_a_tuned_state_is_where_texts_begin(model):
    generator = torch.Generator().manual_seed(0)
    tuned = {f"blocks.{i}.att.time_state": torch.randn(4, 8, 8, generator=generator) for i in range(3)}
    begin = mount(model.initial_state(1), tuned)
    with serve(model, begin=begin) as engine:
        listener, asked = asks(engine, "Hello")
        assert listener.until_whole()[0].text == alone(model, "Hello", begin=begin).text != alone(model, "Hello").text
        assert asked.ids == [*b"Hello"]
        with pytest.raises(InputError, match="the prompt is empty"):
            asks(engine, "")


def test_one_who_leaves_makes_room(model):
    with serve(model, rows=1) as engine:
        first, asked = asks(engine, "a", replace(DRAWN, max_tokens=100_000, temperature=0.0))
        first.told.get(timeout=PATIENCE)
        second, waits = asks(engine, "b", replace(DRAWN, max_tokens=100_000))
        third, _ = asks(engine, "c")
        waits.leave()
        asked.leave()
        assert third.until_whole()[0].text == alone(model, "c").text
        assert second.told.empty()


def test_one_who_leaves_while_he_is_read_is_read_no_further(model, monkeypatch):
    monkeypatch.setattr(engines, "_SLICE", 4)
    halfway, go_on, read = threading.Event(), threading.Event(), engines.read

    def slow(*given):
        if engine.read_tokens == 8:
            halfway.set()
            go_on.wait(PATIENCE)
        return read(*given)

    monkeypatch.setattr(engines, "read", slow)
    with serve(model) as engine:
        _, asked = asks(engine, "x" * 400)
        assert halfway.wait(PATIENCE)
        asked.leave()
        go_on.set()
        assert asks(engine, "Hello")[0].until_whole()[0].text == alone(model, "Hello").text
        assert engine.read_tokens == 12 + 6


def test_a_model_that_breaks_down_is_told_and_the_next_is_answered(model):
    with serve(model) as engine:
        bias = model.ln_out.bias.clone()
        model.ln_out.bias.fill_(float("nan"))
        try:
            with pytest.raises(WorldError, match="largest logit is nan"):
                asks(engine, "Hello")[0].until_whole()
        finally:
            model.ln_out.bias.copy_(bias)
        assert asks(engine, "Other")[0].until_whole()[0].text == alone(model, "Other").text


def test_who_waits_is_told_that_it_is_over(model):
    engine = serve(model, rows=1)
    running, waiting = (asks(engine, x, replace(DRAWN, max_tokens=100_000, temperature=0.0))[0] for x in "ab")
    running.told.get(timeout=PATIENCE)
    engine.close()
    for listener in (running, waiting):
        with pytest.raises(WorldError, match="it is stopping"):
            listener.until_whole()
    with pytest.raises(WorldError, match="it is stopping"):
        asks(engine, "c")


@pytest.mark.parametrize(
    ("prompt", "rows", "message"),
    [
        ("a", range(5), "5 continuations: 1 to 4 fit in the batch; ask for fewer"),
        ("a", (), "0 continuations: 1 to 4"),
        ([1, 128], (0,), "token 128: tokens are 0 to 127; correct the prompt"),
        ([-1], (0,), "token -1: "),
    ],
)
def test_what_can_not_be_answered_is_refused(model, prompt, rows, message):
    with serve(model) as engine, pytest.raises(InputError, match=message):
        asks(engine, prompt, rows=rows)


def test_more_than_can_wait_are_refused(model, monkeypatch):
    monkeypatch.setattr(engines, "_WAITING", 2)
    with serve(model, rows=1) as engine:
        first, asked = asks(engine, "a", replace(DRAWN, max_tokens=100_000, temperature=0.0))
        first.told.get(timeout=PATIENCE)
        others = [asks(engine, "b"), asks(engine, "c")]
        with pytest.raises(WorldError, match="2 prompts wait: that is the most; try again later"):
            asks(engine, "d")
        asked.leave()
        assert [listener.until_whole()[0].ending for listener, _ in others] == ["length", "length"]
