"""An HTTP server in OpenAI's form around an engine: one model, for a look at it. Nothing here is for production.

A request names no file and no address. From a browser only pages of this machine may ask, whatever name they reach it by.
"""

import asyncio
import contextlib
import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse

from flows.access import is_loopback
from flows.openai_form import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Finish,
    Form,
    finish,
    parse,
    refused,
    usage,
)
from rwkv_core.errors import InputError, WorldError
from rwkv_core.generation.engine import Asked, Engine, Told
from rwkv_core.generation.sampling import Sampling
from rwkv_core.generation.text import Continuation, Drawn, Piece
from rwkv_core.generation.thoughts import Effort, Thoughts

_LARGEST = 4 << 20
"""Bytes of a request: a megabyte of text is a long book."""

_LOCAL_ORIGIN = r"https?://(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """What is served, and to whom."""

    engine: Engine
    model: str
    """Its name, for clients."""
    defaults: Sampling
    """For what a request does not say. Where it says no seed either, a random one is taken."""
    effort: Effort
    local: bool
    """Whether it listens where no other machine reaches it."""
    key: str | None
    """What a request must have, if not None."""


def make_app(serving: Serving) -> FastAPI:
    """The server's routes."""
    app = FastAPI(openapi_url=None)  # no pages of its own: FastAPI's load scripts from elsewhere
    app.add_middleware(_Guard, serving=serving)
    app.add_middleware(
        CORSMiddleware, allow_origin_regex=_LOCAL_ORIGIN, allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    about = {"id": serving.model, "object": "model", "created": 0, "owned_by": "rwkv-flow"}

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, error: Any) -> JSONResponse:
        message = f"{request.method} {request.url.path}: there is no such thing here; see docs/serving.md"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_as_told(error).body(), 500)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running, waiting = serving.engine.load()
        return {"status": "ok", "model": serving.model, "running": running, "waiting": waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(serving, name)
        return about

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        effort = asked.reasoning_effort or serving.effort
        if asked.logprobs and effort != "none":
            raise ApiError(400, "logprobs: are of an answer without thoughts; set reasoning_effort to none", "logprobs")
        return await _answered(request, serving, asked, "chat.completion", [asked.prompt(effort)], effort)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        return await _answered(request, serving, asked, "text_completion", asked.prompts(), None)

    return app


def _check_model(serving: Serving, name: str) -> None:
    if name != serving.model:
        message = f"there is no model {name!r} here; {serving.model!r} is served (--model-name gives it another name)"
        raise ApiError(404, message, "model", "model_not_found")


async def _body(request: Request) -> Any:
    """The JSON of a request."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # a page of any site can send other types without being asked for permission first
        raise ApiError(415, "the content-type must be application/json")
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > _LARGEST:
            raise ApiError(413, f"the request is larger than {_LARGEST >> 20} MB; shorten it")
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()
        return body
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None


class _Answer:
    """The continuations of a request, as they come from the engine's thread."""

    def __init__(self, serving: Serving, prompts: list[str | list[int]], count: int, sampling: Sampling) -> None:
        """Ask for `count` continuations of each prompt; their numbers go on from prompt to prompt.

        Raises:
            ApiError: they can't be asked for.
        """
        loop, self._told = asyncio.get_running_loop(), asyncio.Queue[Told]()

        def tell(told: Told) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._told.put_nowait, told)

        self._asked, self.rows = list[Asked](), range(count * len(prompts))
        self.wholes: dict[int, Continuation] = {}
        self._begun = serving.engine.begun
        try:
            for i, prompt in enumerate(prompts):
                rows = range(i * count, (i + 1) * count)
                self._asked.append(serving.engine.ask(prompt, rows, sampling, tell))
        except InputError as error:
            self.leave()
            raise refused(error) from None
        except WorldError as error:
            self.leave()
            raise ApiError(503, str(error)) from None
        self.likely = sampling.logprobs is not None
        """Whether the tokens are to be told."""
        decode = serving.engine.tokenizer.decode
        before = [len(prompt if isinstance(prompt, str) else decode(prompt)) for prompt in prompts]
        self.before = [characters for characters in before for _ in range(count)]
        """Of each continuation: characters of its prompt."""

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until each continuation is whole.

        Raises:
            ApiError: it failed.
        """
        while len(self.wholes) < len(self.rows):
            told = await self._told.get()
            if isinstance(told, Exception):
                raise _as_told(told)
            if told.whole is not None:
                self.wholes[told.row] = told.whole
            yield told

    def usage(self) -> dict[str, Any]:
        """Of all that is whole. Token 0 before a text is not the client's."""
        read = sum(len(asked.ids) - self._begun for asked in self._asked)
        known = sum(max(asked.known - self._begun, 0) for asked in self._asked)
        return usage(read, known, self.wholes.values())

    def leave(self) -> None:
        """Want no more."""
        for asked in self._asked:
            asked.leave()


async def _answered(
    request: Request,
    serving: Serving,
    asked: ChatRequest | CompletionRequest,
    kind: Literal["chat.completion", "text_completion"],
    prompts: list[str | list[int]],
    effort: Effort | None,
) -> Response:
    """The response; `effort` is that of a conversation, and None where text goes on as it is."""
    _check_model(serving, asked.model)
    try:
        sampling = asked.sampling(serving.defaults, secrets.randbits(32))
    except InputError as error:
        raise refused(error) from None
    answer = _Answer(serving, prompts, asked.n or 1, sampling)
    name = f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{secrets.token_hex(12)}"
    form = Form(kind, name, serving.model, serving.engine.tokenizer.table)
    if asked.stream:
        counts = asked.stream_options is not None and asked.stream_options.include_usage
        events = _events(answer, form, effort, counts)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    work = asyncio.ensure_future(_collected(answer, form, effort))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(work.result()) if work.done() else Response(status_code=499)  # nginx's: nobody reads it
    finally:
        gone.cancel()
        work.cancel()
        answer.leave()


async def _gone(request: Request) -> None:
    """Until the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _parts(
    answer: _Answer, effort: Effort | None
) -> AsyncIterator[tuple[int, str, str, Finish | None, tuple[Drawn, ...]]]:
    """Of each piece its continuation's number, what is said and thought with it, why it ended, if it did, and its tokens."""
    parting = {} if effort is None else {row: Thoughts(effort) for row in answer.rows}
    async for piece in answer.pieces():
        why = None if piece.whole is None else finish(piece.whole)
        thought, said = "", piece.text
        if piece.row in parting:
            thought, said = parting[piece.row].push(piece.text, final=why is not None)
        yield piece.row, said, thought, why, piece.drawn


async def _collected(answer: _Answer, form: Form, effort: Effort | None) -> dict[str, Any]:
    said, thought, why = ({row: "" for row in answer.rows} for _ in range(3))
    drawn: dict[int, list[Drawn]] = {row: [] for row in answer.rows}
    async for row, more, thoughts, ended, tokens in _parts(answer, effort):
        said[row] += more
        thought[row] += thoughts
        why[row] = ended or why[row]
        drawn[row] += tokens
    choices = []
    for row in answer.rows:
        logprobs = form.logprobs(drawn[row], answer.before[row]) if answer.likely else None
        choices.append(form.choice(row, said[row], thought[row], why[row], logprobs))  # type: ignore[arg-type]
    return form.whole(choices, answer.usage())


async def _events(answer: _Answer, form: Form, effort: Effort | None, counts: bool) -> AsyncIterator[str]:
    """Server-sent events; the client that hangs up ends them."""

    def event(choices: list[dict[str, Any]], total: dict[str, Any] | None = None) -> str:
        return _event(form.chunk(choices, total, counts=counts))

    try:
        if effort is not None:
            yield event([form.opening(row) for row in answer.rows])
        async for row, said, thought, why, drawn in _parts(answer, effort):
            if said or thought or why or drawn:
                logprobs = form.logprobs(drawn, answer.before[row]) if drawn else None
                yield event([form.delta(row, said, thought, why, logprobs)])
        if counts:
            yield event([], answer.usage())
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status is sent already
        yield _event(error.body())
    finally:
        answer.leave()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _as_told(error: Exception) -> ApiError:
    """What a client is told of a failure: of a defect of ours no more than that."""
    if isinstance(error, WorldError):
        return ApiError(503, str(error))
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its terminal says more")


_Scope = MutableMapping[str, Any]
_App = Callable[[_Scope, Any, Any], Awaitable[None]]


class _Guard:
    """Lets a request through to the routes, or refuses it.

    A page of another site can send a browser here under a name of its own that leads to this machine: what it asks has that
    name as its Host, and the site as its Origin.
    """

    def __init__(self, app: _App, serving: Serving) -> None:
        self._app, self._serving = app, serving

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        error = self._fault(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(error.body(), error.status)(scope, receive, send)

    def _fault(self, scope: _Scope) -> ApiError | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._serving.local and not _is_local(headers.get("host", "")):
            return ApiError(
                403, "the Host of a request must be this machine: 127.0.0.1 or localhost", code="wrong_host"
            )
        origin = headers.get("origin")
        if self._serving.local and origin is not None and re.fullmatch(_LOCAL_ORIGIN, origin) is None:
            return ApiError(403, f"{origin}: only pages of this machine may ask", code="wrong_origin")
        key = self._serving.key
        if key is not None and scope["path"] != "/health":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), key.encode()):
                return ApiError(401, "the API key is missing or wrong; give the server's", code="invalid_api_key")
        return None


def _is_local(host: str) -> bool:
    """Whether a Host, with its port or without, is this machine."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:  # no address at all
        return False
