"""Texts that a model continues while it is trained."""

import json

import pytest
import torch
from guarded import LORA, Stop, bits, equal, lay, settings, train
from methods import EXAMPLES

from rwkv_core.errors import InputError
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import generate
from rwkv_core.tokenizer import Tokenizer

PROMPTS = ("ab", "c")
SAMPLES = {"every": 3, "prompts": PROMPTS, "max_tokens": 6, "temperature": 1.0, "top_p": 0.9}
LETTERS = Tokenizer([b"", *(bytes([64 + i]) for i in range(1, 64))], lambda text: [ord(letter) - 64 for letter in text])
"""As many letters as the small model has tokens."""


@pytest.fixture
def place(tmp_path):
    lay(tmp_path)
    return tmp_path


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().split("\n")[:-1]]


@pytest.mark.parametrize("adapter", [LORA, EXAMPLES[-1]], ids=lambda x: x.kind)
def test_they_are_what_the_model_says_and_change_nothing(adapter, place):
    model, first = train(place, settings(steps=7, samples=SAMPLES), adapter=adapter, tokenizer=LETTERS, folder="one")
    plain, second = train(place, settings(steps=7), adapter=adapter, folder="two")
    assert first.history == second.history
    assert equal(bits(model), bits(plain))
    assert model.training
    assert not (place / "two/samples.jsonl").exists()
    found = lines(place / "one")
    assert [(x["step"], x["prompt"]) for x in found] == [(step, prompt) for step in (0, 3, 6, 7) for prompt in PROMPTS]
    sampling = Sampling(max_tokens=6, temperature=1.0, top_p=0.9, seed=11 * 1_000_003 + 7)
    with torch.no_grad():
        begin = [None if adapter is LORA else model.eval().initial_state(1)] * 2
        said = generate(model.eval(), LETTERS, PROMPTS, sampling, ctx_len=24, batch=2, states=begin)
    assert [x["text"] for x in found[-2:]] == [x.text for x in said]
    assert len({x["text"] for x in found}) > 4


def test_a_run_that_was_killed_has_the_same(place):
    config = settings(steps=7, samples=SAMPLES, checkpoint_every=4)
    train(place, config, tokenizer=LETTERS)
    for at in (2, 5, 7):

        def stop(step, metrics, at=at):
            if step == at:
                raise Stop

        with pytest.raises(Stop):
            train(place, config, log=stop, tokenizer=LETTERS, folder=f"run {at}")
        train(place, config, tokenizer=LETTERS, folder=f"run {at}")
        assert (place / f"run {at}/samples.jsonl").read_bytes() == (place / "run/samples.jsonl").read_bytes()


def test_without_a_tokenizer_they_are_refused(place):
    with pytest.raises(InputError, match=r"train.samples: text is made of tokens by a tokenizer"):
        train(place, settings(samples=SAMPLES))
    assert not (place / "run/last.ckpt").exists()
