from collections import Counter

import pytest
import torch

from rwkv_core.generate import draw, generate
from rwkv_core.tokenizer import Tokenizer

LETTERS = Tokenizer([b"", *(bytes([31 + i]) for i in range(1, 62)), b"", b""], lambda text: [ord(c) - 31 for c in text])
"""Ids 1 to 61 are characters from the blank on; 62 and 63 are free."""


class Script(torch.nn.Module):
    """A model that gives one logit row a call, and notes what it was asked."""

    def __init__(self, *rows):
        super().__init__()
        self.emb = torch.nn.Embedding(64, 1)
        self.rows, self.asked = list(rows), []

    def forward(self, tokens, state=None):
        self.asked.append((tokens.tolist(), state))
        logits = torch.full((1, tokens.shape[1], 64), -1e9)
        logits[0, -1] = self.rows[len(self.asked) - 1]
        return logits, len(self.asked)


def likely(**tokens):
    row = torch.full((64,), -30.0)
    for token, p in tokens.items():
        row[int(token[1:])] = torch.tensor(p).log()
    return row


OPTIONS = {"max_tokens": 10, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def test_the_prompt_follows_token_0_and_the_state_is_passed_on():
    model = Script(likely(_40=1.0), likely(_41=1.0), likely(_0=1.0))
    assert generate(model, LETTERS, "!#", **OPTIONS) == "GH"
    assert model.asked == [([[0, 2, 4]], None), ([[40]], 1), ([[41]], 2)]


@pytest.mark.parametrize("end", [0, 62])
def test_stops_at_the_end_of_the_document_and_at_free_ids(end):
    model = Script(likely(_40=1.0), likely(**{f"_{end}": 1.0}), likely(_40=1.0))
    assert generate(model, LETTERS, "", **OPTIONS) == "G"


def test_stops_after_max_tokens():
    model = Script(*[likely(_40=1.0)] * 50)
    assert generate(model, LETTERS, "", **(OPTIONS | {"max_tokens": 4})) == "GGGG"


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}])
def test_is_a_function_of_its_arguments(options, tiny):
    tiny.eval()
    options = OPTIONS | options
    torch.manual_seed(1)
    one = generate(tiny, LETTERS, "AB", **options)
    torch.manual_seed(2)
    assert generate(tiny, LETTERS, "AB", **options) == one


def test_greedy_is_the_likeliest_token_of_the_whole_sequence(tiny):
    tiny.eval()
    text = generate(tiny, LETTERS, "AB", **OPTIONS)
    ids = [0, *LETTERS.encode("AB")]
    for character in text:
        with torch.no_grad():
            best = int(tiny(torch.tensor([ids]))[0][0, -1].argmax())
        assert LETTERS.decode([best]) == character
        ids.append(best)


def test_ends_inside_a_character():
    halves = Tokenizer([b"", b"\xf0\x9f", b"\xa6\x85", *[b""] * 61], lambda text: [])
    options = OPTIONS | {"max_tokens": 1}
    assert generate(Script(likely(_1=1.0), likely(_2=1.0)), halves, "", **options) == "\ufffd"
    options = OPTIONS | {"max_tokens": 2}
    assert generate(Script(likely(_1=1.0), likely(_2=1.0), likely(_1=1.0)), halves, "", **options) == "🦅"


def drawn(temperature, top_p, row, times=2000):
    generator = torch.Generator().manual_seed(0)
    return Counter(draw(row, temperature, top_p, generator) for _ in range(times))


ROW = likely(_3=0.5, _9=0.3, _5=0.15, _7=0.05)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, {3}), (0.5001, {3, 9}), (0.79, {3, 9}), (0.81, {3, 9, 5}), (0.96, {3, 9, 5, 7})]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    assert set(drawn(1.0, top_p, ROW)) == kept


def test_draws_follow_the_probabilities():
    count = drawn(1.0, 1.0, ROW)
    assert [count[token] / 2000 for token in (3, 9, 5, 7)] == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.035)


def test_temperature():
    sharp, flat = drawn(0.5, 1.0, ROW), drawn(3.0, 0.999, ROW)
    squares = [p**2 / (0.25 + 0.09 + 0.0225 + 0.0025) for p in (0.5, 0.3, 0.15, 0.05)]
    assert [sharp[token] / 2000 for token in (3, 9, 5, 7)] == pytest.approx(squares, abs=0.035)
    assert flat[7] > count_of(7) * 2


def count_of(token):
    return drawn(1.0, 1.0, ROW)[token]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-320])
def test_a_low_temperature_is_greedy(temperature):
    """0.1 to the power of 1000 is no number any more."""
    row = likely(**{f"_{i}": 0.09 for i in range(1, 11)}, _11=0.1)
    assert drawn(temperature, 1.0, row, 20) == {11: 20}


def test_zero_is_greedy():
    assert drawn(0, 1.0, ROW, 20) == {3: 20}
