"""Runs llama.cpp, through llama-cpp-python, on a GGUF. Only ever in a process of its own: it aborts on what it dislikes."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_core.conformance.contents import Array, Unreadable


class Seen(NamedTuple):
    """What llama.cpp makes of a file."""

    logits: list[Array]
    """(T, V) for each prompt."""
    pieces: list[bytes]
    """Bytes of every token, as it prints them."""
    tokens: list[list[int]]
    """Of each text."""
    ends: dict[str, int]
    """bos, eos, eot."""


def name() -> str:
    """What the verdict calls it."""
    import llama_cpp

    told = f"llama-cpp-python {llama_cpp.__version__}"
    with_version = getattr(llama_cpp, "llama_version", None)
    if with_version is None:
        return told
    found = with_version()
    return f"llama.cpp {found.decode() if isinstance(found, bytes) else found}, {told}"


def logits(path: Path, prompts: Sequence[Sequence[int]], texts: Sequence[str]) -> Seen:
    """What llama.cpp computes, and how it reads the tokens.

    Args:
        path: a .gguf.
        prompts: token ids.
        texts: to encode.

    Raises:
        Unreadable: it does not load the file.
    """
    import llama_cpp as api

    log: Any = api.llama_log_callback(
        lambda level, text, data: os.write(2, text) if level >= 3 else None
    )  # 3: warnings
    api.llama_log_set(log, ctypes.c_void_p(0))
    api.llama_backend_init()
    settings = api.llama_model_default_params()
    settings.use_extra_bufts = False  # matrices as they are in the file: repacked for AMX, small ones in Q8_0 crash it
    model = api.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise Unreadable("llama.cpp does not load it")
    vocab = api.llama_model_get_vocab(model)
    size = api.llama_vocab_n_tokens(vocab)
    made = []
    longest = max(len(prompt) for prompt in prompts)
    for prompt in prompts:
        wanted = api.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = longest
        wanted.n_threads = wanted.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        context = api.llama_init_from_model(model, wanted)
        if not context:
            raise Unreadable("llama.cpp makes no context of it")
        batch = api.llama_batch_init(len(prompt), 0, 1)
        batch.n_tokens = len(prompt)
        for i, token in enumerate(prompt):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if api.llama_decode(context, batch) != 0:
            raise Unreadable("llama.cpp does not compute with it")
        values = api.llama_get_logits(context)
        made.append(np.ctypeslib.as_array(values, (len(prompt), size)).copy())
        api.llama_batch_free(batch)
        api.llama_free(context)
    seen = Seen(
        made,
        [_piece(api, vocab, i) for i in range(size)],
        [_encoded(api, vocab, text) for text in texts],
        {end: int(getattr(api, f"llama_vocab_{end}")(vocab)) for end in ("bos", "eos", "eot")},
    )
    api.llama_model_free(model)
    return seen


def _piece(api: Any, vocab: Any, token: int) -> bytes:
    room = ctypes.create_string_buffer(256)
    length = api.llama_token_to_piece(vocab, token, room, len(room), 0, False)
    return room.raw[: max(length, 0)]


def _encoded(api: Any, vocab: Any, text: str) -> list[int]:
    data = text.encode()
    room = (api.llama_token * (len(data) + 1))()
    count = api.llama_tokenize(vocab, data, len(data), room, len(room), False, False)
    return list(room[: max(count, 0)])
