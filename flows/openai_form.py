"""OpenAI's form of requests, answers and errors, as far as a recurrent model can fill it in.

Source: platform.openai.com/docs/api-reference, chat/completions and completions.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rwkv_core.data.dialogue import TURN, said
from rwkv_core.data.readers import Unusable
from rwkv_core.errors import InputError
from rwkv_core.generation.chat import as_document
from rwkv_core.generation.sampling import Likely, Sampling
from rwkv_core.generation.text import Continuation, Drawn
from rwkv_core.generation.thoughts import WAYS, Effort
from rwkv_core.tokenizer import END

_WITHOUT_EFFECT = {
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls",
}  # fmt: skip
"""They change no answer, of OpenAI's either."""

_REFUSED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "logit_bias", "tools", "functions", "function_call", "audio", "prediction", "suffix", "echo",
            "web_search_options", "verbosity",
        ),
        (),
    ),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
}  # fmt: skip
"""What can't be done here, and the values by which it is not asked for, beside null, false, 0 and what is empty."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1)
    frequency_penalty: float | None = Field(default=None, ge=-10, le=10)
    presence_penalty: float | None = Field(default=None, ge=-10, le=10)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    top_k: int | None = Field(default=None, ge=0)
    """Not of OpenAI's form, as the next; see Sampling."""
    penalty_decay: float | None = Field(default=None, ge=0, le=1)

    def sampling(self, default: Sampling, seed: int) -> Sampling:
        """How to draw: as asked, and `default` where nothing is; `seed` too."""
        names = (
            "temperature",
            "top_p",
            "max_tokens",
            "frequency_penalty",
            "presence_penalty",
            "top_k",
            "penalty_decay",
        )
        given: dict[str, Any] = {name: x for name in names if (x := getattr(self, name)) is not None}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return replace(default, **given, stop=tuple(stop), seed=seed if self.seed is None else self.seed)


class ChatRequest(_Request):
    """Of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """What max_tokens is called today."""
    reasoning_effort: Effort | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    def sampling(self, default: Sampling, seed: int) -> Sampling:
        """As of any request; the user's next turn ends an answer too.

        Raises:
            ApiError: top_logprobs without logprobs.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: is for answers with logprobs; set logprobs to true", "top_logprobs")
        chosen = super().sampling(default, seed)
        return replace(
            chosen, max_tokens=self.max_completion_tokens or chosen.max_tokens, stop=(*chosen.stop, TURN),
            logprobs=self.top_logprobs or 0 if self.logprobs else None,
        )  # fmt: skip

    def prompt(self, effort: Effort) -> str:
        """The conversation as a document of the training data, up to where the answer begins.

        Raises:
            ApiError: there is no question in the messages, or they are none.
        """
        try:
            turns = said(self.messages)
        except Unusable as error:
            raise ApiError(400, f"{error}", "messages") from None
        role, question = turns[-1]
        if role != "User" or not question.strip():
            raise ApiError(400, "messages: the last one must ask something; add the user's", "messages")
        way = WAYS[effort]
        return as_document([*turns[:-1], (role, question + way.suffix), ("Assistant", way.begun)])


class CompletionRequest(_Request):
    """Of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=5, strict=True)

    def sampling(self, default: Sampling, seed: int) -> Sampling:
        """As of any request."""
        return replace(super().sampling(default, seed), logprobs=self.logprobs)

    def prompts(self) -> list[str | list[int]]:
        """Each text, or its tokens."""
        given: Any = self.prompt
        whole = isinstance(given, str) or (given and isinstance(given[0], int))
        return [given] if whole else list(given)


_Kind = TypeVar("_Kind", bound=_Request)


def parse(kind: type[_Kind], body: Any) -> _Kind:
    """A request of this kind.

    Raises:
        ApiError: it is none, or asks for what can't be done here.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be an object in JSON")
    kept = {}
    for name, value in body.items():
        if name in _REFUSED and name not in kind.model_fields:
            if value and value not in _REFUSED[name]:
                message = f"{name}: is not supported by `rwkvflow serve`; leave it out"
                raise ApiError(400, message, name, "unsupported_parameter")
        elif name not in _WITHOUT_EFFECT:
            kept[name] = value
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        unknown = first["type"] == "extra_forbidden" and len(first["loc"]) == 1
        message = "is no parameter that is known here" if unknown else first["msg"]
        raise ApiError(400, f"{name}: {message}", name, "unknown_parameter" if unknown else None) from None


def refused(error: InputError) -> ApiError:
    """A request that the model can't be asked."""
    return ApiError(400, str(error))


Finish = Literal["stop", "length"]


def finish(whole: Continuation) -> Finish:
    """Why an answer ended, in OpenAI's words."""
    return "length" if whole.ending == "length" else "stop"


def usage(read: int, known: int, wholes: Iterable[Continuation]) -> dict[str, Any]:
    """What was read and drawn, in tokens; of that read, how many were known from before."""
    drawn = sum(len(whole.tokens) + (whole.ending in ("end", "stop")) for whole in wholes)
    return {
        "prompt_tokens": read,
        "completion_tokens": drawn,
        "total_tokens": read + drawn,
        "prompt_tokens_details": {"cached_tokens": known},
    }


class Form:
    """What all parts of an answer have in common."""

    def __init__(
        self, kind: Literal["chat.completion", "text_completion"], name: str, model: str, table: Sequence[bytes]
    ) -> None:
        """Of an answer called `name`, of a model called `model`, in the tokens of a table."""
        self._kind, self._common = kind, {"id": name, "created": int(time.time()), "model": model}
        self._table = table

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """An answer in one part."""
        return {**self._common, "object": self._kind, "choices": choices, "usage": usage}

    def choice(
        self, index: int, said: str, thought: str, why: Finish, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """One of its continuations."""
        about: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": why}
        if self._kind == "text_completion":
            return {**about, "text": said}
        message = {"role": "assistant", "content": said, "refusal": None}
        return {**about, "message": message | ({"reasoning_content": thought} if thought else {})}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, *, counts: bool) -> dict[str, Any]:
        """A part of many."""
        kind = f"{self._kind}.chunk" if self._kind == "chat.completion" else self._kind
        return {**self._common, "object": kind, "choices": choices} | ({"usage": usage} if counts else {})

    def opening(self, index: int) -> dict[str, Any]:
        """What the first part says of one of its continuations, in a conversation."""
        new = {"role": "assistant", "content": ""}
        return {"index": index, "logprobs": None, "finish_reason": None, "delta": new}

    def delta(
        self, index: int, said: str, thought: str, why: Finish | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        """What one of its continuations has more than before."""
        about: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": why}
        if self._kind == "text_completion":
            return {**about, "text": said}
        new = {"reasoning_content": thought} if thought else {}
        new |= {"content": said} if said else {}
        return {**about, "delta": new}

    def logprobs(self, drawn: Sequence[Drawn], before: int) -> dict[str, Any]:
        """How likely tokens were.

        Args:
            drawn: the tokens.
            before: characters of the prompt, which OpenAI counts in a completion's text_offset.
        """
        if self._kind == "chat.completion":
            content = [
                {**self._token(x.chosen), "top_logprobs": [self._token(other) for other in x.best]} for x in drawn
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._name(x.chosen) for x in drawn],
            "token_logprobs": [x.chosen.logprob for x in drawn],
            "top_logprobs": [{self._name(one): one.logprob for one in (*x.best, x.chosen)} for x in drawn],
            "text_offset": [before + x.at for x in drawn],
        }

    def _token(self, one: Likely) -> dict[str, Any]:
        data = self._data(one)
        return {"token": self._name(one), "logprob": one.logprob, "bytes": list(data) if data else None}

    def _data(self, one: Likely) -> bytes:
        return self._table[one.token] if one.token < len(self._table) else b""

    def _name(self, one: Likely) -> str:
        """A token's text; the bytes of one that is no whole characters, and the number of one that has none."""
        data = self._data(one)
        if not data:
            return "<|endoftext|>" if one.token == END else f"<|{one.token}|>"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return f"bytes:{data.decode('ascii', 'backslashreplace')}"
