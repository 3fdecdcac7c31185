"""`rwkvflow serve` as a process, asked by OpenAI's own client."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx
import methods
import openai
import pytest
import torch
from miniature import free_port, wait_until
from project import write_base

from flows import cli
from rwkv_core import checkpoint
from rwkv_core.generation.chat import open_chat
from rwkv_core.generation.opened import open_model
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import generate
from rwkv_core.tokenizer import world

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
ASKED = [{"role": "user", "content": "What is it?"}]
LIKE_CHAT = Sampling(
    max_tokens=12, temperature=1.0, top_p=0.3, seed=5, presence_penalty=0.5, frequency_penalty=0.5, penalty_decay=0.996
)
"""What both commands do where nothing else is said."""
KEY = "a key for those who may"


class Served(NamedTuple):
    port: int
    process: subprocess.Popen
    said: Path

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def load(self):
        health = httpx.get(f"{self.address}/health").json()
        return health["running"], health["waiting"]


@contextmanager
def served(model: Path, folder: Path, *options: str, **environment: str) -> Iterator[Served]:
    port, said = free_port(), folder / "said.txt"
    command = [sys.executable, "-m", "flows.cli", "serve", str(model), "--port", str(port), "--device", "cpu",
               "--dtype", "fp32", *options]  # fmt: skip
    kept = {name: x for name, x in os.environ.items() if name != "RWKVFLOW_API_KEY"}
    with said.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, start_new_session=True,
            env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip
    try:
        wait_until(lambda: process.poll() is not None or "answers at" in said.read_text(), PATIENCE)
        assert process.poll() is None, said.read_text()
        yield Served(port, process, said)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "goose.pth"
    write_base(path)
    return path


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[Served]:
    with served(model, tmp_path_factory.mktemp("server"), "--batch", "4") as running:
        yield running


@pytest.fixture
def client(server):
    return server.client()


def ask(client, **how):
    return client.chat.completions.create(**{"model": "goose", "messages": ASKED, "max_tokens": 12, "seed": 5} | how)


def test_the_model_has_a_name(client):
    assert [model.id for model in client.models.list().data] == ["goose"]
    assert client.models.retrieve("goose").owned_by == "rwkv-flow"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here; 'goose' is served"):
        client.models.retrieve("gpt")


def test_it_answers_what_chat_answers(model, client):
    chat = open_chat(model, LIKE_CHAT, dtype="fp32", device="cpu")
    want = "".join(chat.answer("What is it?"))
    answer = ask(client)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", want, "length")
    opened = open_model(model)
    read = len(opened.tokenizer.encode("User: What is it?\n\nAssistant:"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, 12)
    assert answer.usage.total_tokens == read + 12


def test_a_stream_is_the_same_in_pieces(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len(pieces) > 6, "it did not stream"
    assert (last.choices, last.usage.completion_tokens) == ([], 12)
    assert last.usage.prompt_tokens == last.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in pieces)
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_a_conversation_goes_on_from_what_was_read(model, client):
    """The next turn has the words that the training data has, and its beginning is known already."""
    system = {"role": "system", "content": "Be\n\nbrief."}
    first = ask(client, messages=[system, {"role": "user", "content": "One?"}], max_tokens=3)
    said = first.choices[0].message.content
    turns = [system, {"role": "user", "content": "One?"}, {"role": "assistant", "content": said}, *ASKED]
    second = ask(client, messages=turns)
    text = f"System: Be\nbrief.\n\nUser: One?\n\nAssistant: {said.strip()}\n\nUser: What is it?\n\nAssistant:"
    opened = open_model(model, dtype="fp32", device="cpu")
    want = generate(opened.model, opened.tokenizer, [text], LIKE_CHAT, ctx_len=512, batch=1)[0].text
    assert second.choices[0].message.content == want.lstrip()
    known = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens <= known < second.usage.prompt_tokens == len(opened.tokenizer.encode(text))


def test_texts_go_on_as_generate_has_it(model, client):
    prompts = ["The state of a", "Once", ""]
    answer = client.completions.create(
        model="goose", prompt=prompts, max_tokens=9, seed=2, temperature=0.8, top_p=0.9, stop=["zzz"],
        presence_penalty=0, frequency_penalty=0.2, extra_body={"penalty_decay": 0.9, "top_k": 50},
    )  # fmt: skip
    opened = open_model(model, dtype="fp32", device="cpu")
    drawn = Sampling(9, 0.8, 0.9, 2, top_k=50, frequency_penalty=0.2, penalty_decay=0.9)
    want = generate(opened.model, opened.tokenizer, prompts, drawn, ctx_len=512, batch=1)
    assert [(x.index, x.text) for x in answer.choices] == [(i, x.text) for i, x in enumerate(want)]
    assert answer.usage.completion_tokens == 27


def test_several_continuations_and_prompts_of_tokens(model, client):
    ids = open_model(model).tokenizer.encode("The state of a")
    text, tokens = (
        client.completions.create(model="goose", prompt=prompt, max_tokens=5, seed=1, n=3, top_p=1.0)
        for prompt in ("The state of a", [ids])
    )
    assert [x.text for x in text.choices] == [x.text for x in tokens.choices]
    assert len({x.text for x in text.choices}) == 3
    assert text.usage.prompt_tokens == len(ids)


def test_a_stop_text_ends_it_and_is_no_part_of_it(client):
    whole = ask(client).choices[0].message.content
    stop = whole[4:7]
    for stream in (False, True):
        answer = ask(client, stop=stop, stream=stream)
        if stream:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            why = chunks[-1].choices[0].finish_reason
        else:
            text, why = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, why) == (whole[: whole.index(stop)], "stop")


def drawn(model, prompt, count, sampling, stop=None):
    """Of each token that `generate` draws: its bytes, its log-probability, the `count` likeliest, and characters before it.

    From the model's logits after all that was read before it, at once.
    """
    opened = open_model(model, dtype="fp32", device="cpu")
    [whole] = generate(opened.model, opened.tokenizer, [prompt], sampling, ctx_len=512, batch=1)
    read = [0, *opened.tokenizer.encode(prompt)]
    with torch.no_grad():
        features, _ = opened.model.features(torch.tensor([[*read, *whole.tokens]]))
        logprobs = torch.log_softmax(opened.model.head(features)[0].double(), -1)
    table, found, text = opened.tokenizer.table, [], b""
    for token, row in zip(whole.tokens, logprobs[len(read) - 1 :], strict=False):
        best = [(table[i], float(row[i])) for i in row.argsort(descending=True)[:count]]
        found.append((table[token], float(row[token]), best, text.decode(errors="ignore")))
        text += table[token]
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_tells_how_likely_each_token_was(model, client, stream):
    """The model's own probabilities, whatever penalties and limits say; characters in several tokens too."""
    want = drawn(model, "User: What is it?\n\nAssistant:", 3, LIKE_CHAT)
    answer = ask(client, logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        chunks = list(answer)
        assert all(chunk.choices[0].logprobs is None for chunk in chunks if chunk.choices[0].delta.role)
        assert sum(chunk.choices[0].logprobs is not None for chunk in chunks) > 6, "they did not stream"
        told = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    else:
        told = answer.choices[0].logprobs.content
    assert [bytes(one.bytes) for one in told] == [data for data, *_ in want]
    assert [one.logprob for one in told] == pytest.approx([logprob for _, logprob, *_ in want], abs=1e-3)
    for one, (data, _, best, _) in zip(told, want, strict=True):
        assert one.token.encode() == data or one.token.startswith("bytes:\\x")
        assert [bytes(other.bytes or ()) for other in one.top_logprobs] == [other for other, _ in best]
        assert [other.logprob for other in one.top_logprobs] == pytest.approx([p for _, p in best], abs=1e-3)


def test_a_completion_tells_how_likely_each_token_was(model, client):
    """At the offsets that OpenAI counts, from the prompt's beginning; of prompts of text and of tokens."""
    ids = open_model(model).tokenizer.encode("Once, 真")
    sampling = replace(LIKE_CHAT, temperature=0.9, top_p=1.0)
    want = drawn(model, "Once, 真", 2, sampling)
    for prompt in ("Once, 真", [ids]):
        for stream in (False, True):
            answer = client.completions.create(
                model="goose",
                prompt=prompt,
                max_tokens=12,
                seed=5,
                temperature=0.9,
                top_p=1.0,
                logprobs=2,
                stream=stream,
            )
            parts = [x.choices[0].logprobs for x in answer if x.choices[0].logprobs] if stream else []
            parts = parts or [answer.choices[0].logprobs]
            assert [offset for part in parts for offset in part.text_offset] == [len("Once, 真" + x) for *_, x in want]
            logprobs = [logprob for part in parts for logprob in part.token_logprobs]
            assert logprobs == pytest.approx([logprob for _, logprob, *_ in want], abs=1e-3)
            tokens, best = ([x for part in parts for x in getattr(part, name)] for name in ("tokens", "top_logprobs"))
            for name, logprob, others, (data, _, likeliest, _) in zip(tokens, logprobs, best, want, strict=True):
                assert name == data.decode(errors="ignore") or name.startswith("bytes:\\x")
                assert others[name] == logprob, "the token that was drawn is among them"
                assert len(others) == len({data, *(other for other, _ in likeliest)})


def test_tokens_of_a_stop_text_are_not_told(client):
    whole = ask(client, logprobs=True).choices[0]
    tokens = whole.logprobs.content
    stop = tokens[4].token + tokens[5].token
    for stream in (False, True):
        answer = ask(client, logprobs=True, stop=stop, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        told = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
        assert told == tokens[:4]
        assert all(one.top_logprobs == [] for one in told)


def test_logprobs_of_none_are_null_and_of_thoughts_are_refused(client):
    assert ask(client).choices[0].logprobs is None
    assert all(chunk.choices[0].logprobs is None for chunk in ask(client, stream=True))
    with pytest.raises(openai.BadRequestError, match="top_logprobs: is for answers with logprobs") as refused:
        ask(client, top_logprobs=2)
    assert refused.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError, match="logprobs: are of an answer without thoughts"):
        ask(client, logprobs=True, reasoning_effort="low")
    with pytest.raises(openai.BadRequestError, match="less than or equal to 20"):
        ask(client, logprobs=True, top_logprobs=21)
    with pytest.raises(openai.BadRequestError, match="less than or equal to 5"):
        client.completions.create(model="goose", prompt="a", max_tokens=1, logprobs=6)


def test_without_a_seed_each_answer_is_another(client):
    said = {ask(client, seed=openai.omit, top_p=1.0).choices[0].message.content for _ in range(3)}
    assert len(said) == 3


@pytest.mark.parametrize(
    ("how", "status", "param", "code", "message"),
    [
        ({"model": "gpt"}, 404, "model", "model_not_found", "there is no model 'gpt' here; 'goose' is served"),
        ({"temperature": -1}, 400, "temperature", None, "greater than or equal to 0"),
        ({"top_p": 0}, 400, "top_p", None, "greater than 0"),
        ({"max_tokens": 0}, 400, "max_tokens", None, "greater than or equal to 1"),
        ({"stop": [""]}, 400, None, None, "stop = .*must not have an empty text"),
        ({"n": 5}, 400, None, None, "5 continuations: 1 to 4 fit"),
        ({"messages": []}, 400, "messages", None, "at least 1"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, 400, "messages", None, "the last one must ask"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages", None, "the last one must ask"),
        ({"messages": [{"role": "ghost", "content": "x"}]}, 400, "messages", None, "'ghost' is no role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]},
            400, "messages", None, "only texts can be learned|only texts",
        ),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter", "tools: is not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported_parameter", "logit_bias"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter", "leave it out"),
        ({"extra_body": {"state": "/etc/passwd"}}, 400, "state", "unknown_parameter", "no parameter that is known"),
    ],
    ids=str,
)  # fmt: skip
def test_what_can_not_be_done_is_refused_in_openais_form(client, how, status, param, code, message):
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=message) as refused:
            ask(client, stream=stream, **how)
        error = refused.value
        assert (error.status_code, error.param, error.code) == (status, param, code)
        assert error.body["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_taken(client):
    want = ask(client).choices[0].message.content
    nothing = {"logit_bias": {}, "logprobs": False, "response_format": {"type": "text"}, "user": "me", "store": False}
    assert ask(client, **nothing, max_completion_tokens=12, max_tokens=openai.omit).choices[0].message.content == want


def test_two_clients_are_answered_at_once(server, client):
    """The second is asked after the first has begun, and is done before it."""
    first = ask(client, stream=True, max_tokens=100_000, temperature=0)
    next(first)
    alone = ask(client)
    others = [threading.Thread(target=lambda i=i: said.__setitem__(i, ask(server.client(), seed=5))) for i in range(2)]
    said: dict = {}
    for other in others:
        other.start()
    for other in others:
        other.join(PATIENCE)
    assert {answer.choices[0].message.content for answer in said.values()} == {alone.choices[0].message.content}
    assert server.load() == (1, 0), "the first one goes on"
    next(first)
    first.close()
    wait_until(lambda: server.load() == (0, 0), PATIENCE)


def test_who_hangs_up_is_not_answered_any_more(server, client):
    stream = ask(client, stream=True, max_tokens=10_000_000, temperature=0)
    next(stream)
    wait_until(lambda: server.load()[0] == 1, PATIENCE)
    stream.close()
    wait_until(lambda: server.load() == (0, 0), PATIENCE)
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=1.0), max_tokens=10_000_000, temperature=0)
    wait_until(lambda: server.load() == (0, 0), PATIENCE)


def post(server, content=None, headers=(), **body):
    content = content if content is not None else json.dumps({"model": "goose", "prompt": "a", "max_tokens": 1} | body)
    headers = {"content-type": "application/json"} | dict(headers)
    return httpx.post(f"{server.address}/v1/completions", content=content, headers=headers, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://localhost.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"origin": "http://localhost:3000"}, 200),
        ({"content-type": "application/json; charset=utf-8"}, 200),
    ],
    ids=str,
)
def test_only_this_machine_may_ask(server, headers, status):
    reply = post(server, headers=headers)
    assert reply.status_code == status, reply.text
    allowed = reply.headers.get("access-control-allow-origin")
    assert allowed == (headers.get("origin") if status == 200 else None)


def test_a_page_of_this_machine_may_ask_before_it_asks(server):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    where = f"{server.address}/v1/chat/completions"
    replies = [httpx.options(where, headers=asked | {"origin": x}) for x in ("http://localhost:5173", "https://x.y")]
    assert [reply.headers.get("access-control-allow-origin") for reply in replies] == ["http://localhost:5173", None]


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        ("{", 400, "the body is no JSON"),
        ("[1]", 400, "must be an object"),
        ("[" * 100_000, 400, "the body is no JSON"),
        (b"\xff", 400, "the body is no JSON"),
        ('{"model": "goose"}', 400, "prompt: Field required"),
        ('{"model": "goose", "prompt": [[65536]]}', 400, "token 65536: tokens are 0 to 65535"),
        ('{"model": "goose", "prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        (b" " * ((4 << 20) + 1), 413, "larger than 4 MB"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_is_no_request_is_refused(server, content, status, message):
    reply = post(server, content=content)
    assert (reply.status_code, message in reply.json()["error"]["message"]) == (status, True), reply.text


def test_what_is_not_there_is_an_error_in_the_same_form(server):
    for reply in (httpx.get(f"{server.address}/docs"), httpx.get(f"{server.address}/v1/completions")):
        assert reply.status_code in (404, 405)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


SAID = [" One", ",", " two", ";", " three", "."]
THOUGHT = [">", "H", "m", "</", "th", "ink", ">(", "Four", "\n\n", "User", ":"]


@pytest.fixture(scope="module")
def parrot(tmp_path_factory) -> Iterator[Served]:
    """A model that says what it is made to: after an "Assistant:" `SAID` and token 0, in a thought `THOUGHT`.

    Its blocks add nothing, so the last token alone decides the next.
    """
    folder = tmp_path_factory.mktemp("parrot")
    write_base(folder / "parrot.pth")
    tensors, vocabulary = checkpoint.read(folder / "parrot.pth"), world()
    for name, x in tensors.items():
        if name.endswith(("output.weight", "ffn.value.weight")):
            x.zero_()
    chains = ([":", *SAID, None], ["think", *THOUGHT])
    follows = {one: other for chain in chains for one, other in itertools.pairwise(chain)}
    tensors["emb.weight"].zero_()
    tensors["head.weight"].zero_()
    generator = torch.Generator().manual_seed(0)
    for text, following in follows.items():
        direction = torch.randn(tensors["emb.weight"].shape[1], generator=generator).sign()
        tensors["emb.weight"][vocabulary.table.index(text.encode())] = direction
        tensors["head.weight"][0 if following is None else vocabulary.table.index(following.encode())] += direction
    checkpoint.write(folder / "parrot.pth", tensors)
    with served(folder / "parrot.pth", folder) as running:
        yield running


def hear(parrot, stream, **how):
    """What is said, what is thought, why it ended, and of how many tokens."""
    how = {"model": "parrot", "messages": ASKED, "stream": stream} | how
    if not stream:
        answer = parrot.client().chat.completions.create(**how)
        [choice] = answer.choices
        thought = getattr(choice.message, "reasoning_content", "")
        return choice.message.content, thought, choice.finish_reason, answer.usage.completion_tokens
    *chunks, last = parrot.client().chat.completions.create(**how, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    said = "".join(delta.content or "" for delta in deltas)
    thought = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
    why = [chunk.choices[0].finish_reason for chunk in chunks]
    assert not any(why[:-1])
    return said, thought, why[-1], last.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_how_an_answer_ends_and_what_it_counts(parrot, stream):
    """By token 0, at its longest, by a stop text; and what might have become one is said after all."""
    whole = "".join(SAID).lstrip()
    assert hear(parrot, stream) == (whole, "", "stop", 7)
    assert hear(parrot, stream, max_tokens=6) == (whole, "", "length", 6)
    assert hear(parrot, stream, max_tokens=7) == (whole, "", "stop", 7)
    assert hear(parrot, stream, max_tokens=2) == ("One,", "", "length", 2)
    assert hear(parrot, stream, max_completion_tokens=2, max_tokens=5) == ("One,", "", "length", 2)
    assert hear(parrot, stream, stop=" two") == ("One,", "", "stop", 3)
    assert hear(parrot, stream, stop=["never", "; thr", "wo;"]) == ("One, t", "", "stop", 4)
    assert hear(parrot, stream, stop="three.\n") == (whole, "", "stop", 7)
    assert hear(parrot, stream, stop="three.\n", max_tokens=6) == (whole, "", "length", 6)


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_is_apart_and_the_next_turn_ends_an_answer(parrot, stream):
    for effort in ("low", "medium", "high"):
        assert hear(parrot, stream, reasoning_effort=effort) == ("(Four", "Hm", "stop", len(THOUGHT))
    assert hear(parrot, stream, reasoning_effort="low", max_tokens=4) == ("", "Hm</", "length", 4)


def test_what_was_read_is_counted_once(parrot):
    """Without token 0; two prompts, two continuations of each."""
    answer = parrot.client().completions.create(model="parrot", prompt=["a:", "b:"], n=2, max_tokens=3)
    assert [(x.index, x.text, x.finish_reason) for x in answer.choices] == [
        (i, " One, two", "length") for i in range(4)
    ]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 12, 16)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    again = parrot.client().completions.create(model="parrot", prompt="a: One,", max_tokens=1)
    assert (again.usage.prompt_tokens, again.usage.prompt_tokens_details.cached_tokens) == (4, 2)


def test_a_stream_ends_as_openais_does(parrot):
    body = {"model": "parrot", "messages": ASKED, "stream": True}
    reply = httpx.post(f"{parrot.address}/v1/chat/completions", json=body, timeout=PATIENCE)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, end, empty = reply.text.split("\n\n")
    assert (end, empty) == ("data: [DONE]", "")
    assert {json.loads(event.removeprefix("data: "))["object"] for event in events} == {"chat.completion.chunk"}


@pytest.fixture(scope="module")
def with_state(model, tmp_path_factory) -> Path:
    """A LoRA with a tuned state."""
    [config] = [x for x in methods.OTHERS if x.kind == "lora" and x.state == "wkv and token shift"]
    return methods.adapter(model, config, tmp_path_factory.mktemp("adapter") / "adapter.pth")


def test_adapter_state_and_key(model, with_state, tmp_path):
    """What is mounted answers, to whoever has the key; Ctrl+C ends it while somebody listens."""
    options = ("--adapter", str(with_state), "--host", "0.0.0.0", "--model-name", "tuned")
    with served(model, tmp_path, *options, RWKVFLOW_API_KEY=KEY) as server:
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            ask(server.client("wrong"))
        assert httpx.get(f"{server.address}/health").status_code == 200
        answer = ask(server.client(KEY), model="tuned").choices[0].message.content
        chat = open_chat(model, LIKE_CHAT, adapter=with_state, dtype="fp32", device="cpu")
        bare = open_chat(model, LIKE_CHAT, dtype="fp32", device="cpu")
        assert answer == "".join(chat.answer("What is it?")) != "".join(bare.answer("What is it?"))
        stream = ask(server.client(KEY), model="tuned", stream=True, max_tokens=10_000_000, temperature=0)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server: it is stopping"):
            list(stream)
        assert server.process.wait(PATIENCE) == 0
    said = server.said.read_text()
    assert "This is for a look, and no production server." in said
    assert KEY not in said
    assert said.splitlines()[-1] == "Stopped."
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_state_on_a_packed_base(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tuned = {f"blocks.{i}.att.time_state": torch.randn(4, 8, 8, generator=generator) for i in range(2)}
    checkpoint.write(tmp_path / "state.pth", tuned)
    with served(model, tmp_path, "--state", str(tmp_path / "state.pth"), "--quantize", "nf4") as server:
        answer = ask(server.client()).choices[0].message.content
    opened = open_model(model, state=tmp_path / "state.pth", quantize="nf4", dtype="fp32", device="cpu")
    prompt, begin = "User: What is it?\n\nAssistant:", [opened.begin]
    want = generate(opened.model, opened.tokenizer, [prompt], LIKE_CHAT, ctx_len=512, batch=1, states=begin)[0].text
    assert answer == want.lstrip()
    exact = open_model(model, state=tmp_path / "state.pth", dtype="fp32", device="cpu")
    other = generate(exact.model, exact.tokenizer, [prompt], replace(LIKE_CHAT), ctx_len=512, batch=1, states=begin)[0]
    assert other.text != want, "packed weights answer otherwise"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: other machines reach it, and anybody could ask; set RWKVFLOW_API_KEY"),
        (["--api-key", "short"], "RWKVFLOW_API_KEY: must have 12 characters or more, all of ASCII; set another"),
        (["--host", "example.com"], "--host example.com: must be an address of this machine"),
        (["--host", "192.0.2.7", "--api-key", KEY], "--host 192.0.2.7 (Cannot assign requested address): must be"),
        (["--top-p", "0"], "top_p = 0.0: must be above 0"),
        (["--state", "none.pth"], "none.pth: no checkpoint is there"),
    ],
    ids=str,
)
def test_a_problem_is_one_line(model, options, problem, monkeypatch, capsys):
    port = str(free_port())
    monkeypatch.setattr(sys, "argv", ["rwkvflow", "serve", str(model), "--port", port, *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"rwkvflow: {problem}")


def test_a_port_that_is_taken(model, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["rwkvflow", "serve", str(model), "--port", str(port)])
        with pytest.raises(SystemExit):
            cli.main()
    assert capsys.readouterr().err == (
        f"rwkvflow: port {port}: another program listens there; stop it, or give --port {port % 65535 + 1}\n"
    )
