"""`rwkvflow serve`: a model for a client of OpenAI's API, to look at it there. Nothing for production."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows import access, options
from rwkv_core.errors import InputError, WorldError

if TYPE_CHECKING:
    from flows.openai_api import Serving

KEY = "RWKVFLOW_API_KEY"
"""Environment variable with the key that clients must have; arguments can be seen by other users of a machine."""

_SHORTEST = 12  # characters of a key
_CLIENTS_END = 5  # seconds for what is still being sent when the server stops
_POLL = 0.2  # seconds


def serve(
    model: options.Model,
    state: options.State = None,
    adapter: options.Adapter = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at. Beyond this machine clients must have a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY, show_envvar=True, help="What clients must have, 12 characters or more.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model; the file's name, if none.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Answers at a time; others wait for their turn.")] = 8,
    cache_mb: Annotated[
        int, typer.Option(min=0, help="Memory for states of conversations, which then go on from there.")
    ] = 512,
    reasoning_effort: Annotated[
        Literal["none", "minimal", "low", "medium", "high"],
        typer.Option(help="How a G1 model thinks where a request does not say."),
    ] = "none",
    tokenizer: options.Tokenizer = None,
    special: options.Special = None,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 0.3,
    top_k: options.TopK = 0,
    presence_penalty: options.PresencePenalty = 0.5,
    frequency_penalty: options.FrequencyPenalty = 0.5,
    penalty_decay: options.PenaltyDecay = 0.996,
    max_tokens: options.MaxTokens = 2000,
    quantize: options.Quantize = "none",
    dtype: options.Dtype = "as_loaded",
    head_size_divisor: options.Divisor = None,
    device: options.Device = None,
) -> None:
    """Answer clients of OpenAI's API, on this machine. How answers are drawn is for requests that do not say it.

    It is for a look at a result in the client that you have: one model, one process, no accounts. It is no production server.
    """
    local = access.is_loopback(host)
    _check_key(api_key, host, local)
    with _listening(host, port) as listener:  # before the model is loaded, which may take a minute
        from flows.openai_api import Serving
        from rwkv_core.generation.engine import Engine
        from rwkv_core.generation.opened import open_model
        from rwkv_core.generation.sampling import Sampling

        defaults = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=0,
            top_k=top_k,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            penalty_decay=penalty_decay,
        )
        typer.echo(f"Loading {model} …")
        opened = open_model(
            model,
            adapter=adapter,
            state=state,
            tokenizer=tokenizer,
            special=options.special_tokens(special),
            dtype=dtype,
            device=device,
            head_size_divisor=head_size_divisor,
            quantize=quantize,
        )
        name = model_name or (model.name if model.is_dir() else model.stem)
        with Engine(opened, rows=batch, cache_bytes=cache_mb << 20) as engine:
            _run(Serving(engine, name, defaults, reasoning_effort, local, api_key), listener, host, port)
    typer.echo("Stopped.")


def _check_key(key: str | None, host: str, local: bool) -> None:
    if key is None and not local:
        raise InputError(
            f"--host {host}", "other machines reach it, and anybody could ask", f"set {KEY} to a key for your clients"
        )
    if key is not None and (len(key) < _SHORTEST or not key.isascii()):
        raise InputError(KEY, f"must have {_SHORTEST} characters or more, all of ASCII", "set another")


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at that address, closed at the end.

    Raises:
        InputError: the address is not this machine's.
        WorldError: something listens there.
    """
    family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of one that has just stopped
        try:
            listener.bind(where)
            listener.listen()
        except OSError as error:
            if isinstance(error, PermissionError):
                raise WorldError(f"port {port}", "it is the system's", f"give --port {port + 8000}") from None
            if error.errno == errno.EADDRINUSE:
                rule = "another program listens there"
                raise WorldError(f"port {port}", rule, f"stop it, or give --port {port % 65535 + 1}") from None
            raise InputError(
                f"--host {host} ({error.strerror})", "must be an address of this machine", "give 127.0.0.1"
            ) from None
        yield listener


def _run(serving: "Serving", listener: socket.socket, host: str, port: int) -> None:
    """Answer until a signal asks to stop; what is being answered then ends with an error."""
    import threading

    import uvicorn

    from flows.openai_api import make_app
    from flows.signals import stop_on_signal

    config = uvicorn.Config(
        make_app(serving), log_level="warning", access_log=False, timeout_graceful_shutdown=_CLIENTS_END, ws="none"
    )
    server = uvicorn.Server(config)
    with stop_on_signal() as stop:  # uvicorn's own signals are for the main thread, and end the program by themselves
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http")
        thread.start()
        address = f"[{host}]" if ":" in host else host
        typer.echo(
            f"{serving.model} answers at http://{address}:{port}/v1"
            f"{'' if serving.key is None else ', to whoever has the key'}; Ctrl+C stops it.\n"
            "This is for a look, and no production server."
        )
        try:
            while not stop.wait(_POLL):
                if not thread.is_alive():
                    raise WorldError("the server", "ended by itself", "read what it said above, and start it again")
        finally:
            serving.engine.close()
            server.should_exit = True
            thread.join()
