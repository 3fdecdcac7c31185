"""What can be said of a file without running the model: its tensors, their values, its tokens.

Sources: the checklist is that of the clients' loaders; see `layout` and the readers.
"""

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_core.conformance import layout
from rwkv_core.conformance.contents import HALVED, ROUNDED, Array, Contents, Stored

_PIECE = 1 << 24
"""Values that are compared at once: it bounds the memory."""

FREE = 65530
"""The first of World's ids that are free for special tokens."""

_NAMED = 3
"""Tensors that a finding names."""

_Q8_STEP = 0.57
"""Of Q8_0, how far a value may be from what is stored, in steps of its block. Half a step is rounding; the step itself is
rounded to float16, which moves the 127th multiple by up to 127 / 2048 of a step."""


class Finding(NamedTuple):
    """Something that was looked at."""

    what: str
    found: str
    rule: str
    passed: bool


def names(contents: Contents) -> list[Finding]:
    """Which tensors there are, how they are called, how they lie; what else the reader has found."""
    lost, strange = contents.missing, contents.unexpected
    stray = [name for name in strange if "time_state" in name]
    why = (
        "a tuned state is a file of its own: in the model, clients ignore it or refuse the file"
        if stray
        else "clients ignore it or refuse the file"
    )
    found = [
        Finding("no tensor is missing", _listed(lost) or "none", "all that its clients ask for", not lost),
        Finding(
            "no tensor is left over",
            _listed(strange) or "none",
            why if strange else "none that no client knows",
            not strange,
        ),
        *(Finding(what, seen, rule, False) for what, seen, rule in contents.findings),
    ]
    if not any(what in ("contiguous", "storage of its own") for what, _, _ in contents.findings):
        count = len(contents.tensors)
        found.append(Finding("storage of its own", f"{count} tensors, each in one piece", "no views", True))
    return found


class Compared(NamedTuple):
    """How a file's values relate to those of the model that it was made from."""

    findings: list[Finding]
    flushed: int
    """Values that became zero."""
    total: int
    largest: float
    """Rounding of a value."""
    kinds: dict[str, str]
    """How each tensor is stored."""


def values(contents: Contents, source: Mapping[str, Stored]) -> Compared:
    """Compare every tensor with the model's, to the bit of its rounding.

    Args:
        contents: of the file.
        source: the model's tensors, by official names.
    """
    wrong, shapes, infinite = list[str](), list[str](), list[str]()
    flushed, total, largest = 0, 0, 0.0
    wanted = [name for name in source if name not in layout.UNUSED]
    for name in wanted:
        stored = contents.tensors.get(name)
        if stored is None:
            continue
        fits = _fitted(name, stored, source[name])
        if fits is None:
            shapes.append(f"{name} is {stored.shape}, of the model {source[name].shape}")
            continue
        same = True
        for got, want in fits:
            if not np.isfinite(got).all():
                infinite.append(f"{name} has {int((~np.isfinite(got)).sum())}")
            scaled = want / np.float32(contents.divisor(name))
            if stored.kind == "Q8_0":
                same &= _within_steps(got, scaled)
            else:
                same &= bool(np.array_equal(got, ROUNDED[stored.kind](scaled)))
            with np.errstate(invalid="ignore"):
                largest = max(largest, float(np.nan_to_num(np.abs(got - scaled), nan=0, posinf=0).max(initial=0)))
            flushed += int(((got == 0) & (want != 0)).sum())
            total += want.size
        if not same:
            wrong.append(f"{name} {_diagnosis(name, stored, source, contents)}")
    kinds = contents.kinds
    order = [name for name in contents.tensors if name in source]
    given = [name for name in source if name in contents.tensors]
    counted = ", ".join(f"{list(kinds.values()).count(kind)} {kind}" for kind in sorted(set(kinds.values())))
    findings = [
        Finding(
            "shapes",
            _listed(shapes) or "those of the model",
            "those of the model, in the format's orientation",
            not shapes,
        ),
        Finding("finite", _listed(infinite) or "all", "no infinity and no NaN: float16 ends at 65504", not infinite),
        Finding(
            "values are the model's",
            _listed(wrong) or f"{total:,} in {counted}, none off by more than {largest:.3g}",
            "equal, but for the rounding of each one's storage",
            not wrong,
        ),
        Finding("what became zero", f"{flushed:,} of {total:,} ({flushed / max(total, 1):.2%})", "reported", True),
    ]
    if contents.facts == {} and order != given:
        at = next(i for i, (a, b) in enumerate(zip(order, given, strict=True)) if a != b)
        findings.append(
            Finding(
                "order",
                f"{order[at]} where the model has {given[at]}",
                "reported: only x_r to x_g are read by it",
                True,
            )
        )
    return Compared(findings, flushed, total, largest, kinds)


def state(contents: Contents, model: Contents | None) -> list[Finding]:
    """Whether a state file is one that RWKV Runner takes for this model.

    Args:
        contents: of the state file.
        model: of the model's file, if it is there.
    """
    count, shapes = len(contents.tensors), {x.shape for x in contents.tensors.values()}
    square = all(len(s) == 3 and s[1] == s[2] for s in shapes) and len(shapes) == 1
    found = [Finding("shape of each state", ", ".join(map(str, shapes)), "one, (heads, size, size)", square)]
    if model is not None and "emb.weight" in model.tensors:
        channels = model.tensors["emb.weight"].shape[1]
        found.append(
            Finding(
                "as many states as blocks",
                str(count),
                f"{model.n_layer}: Runner counts the tensors of the file",
                count == model.n_layer,
            )
        )
        heads = next(iter(shapes))[:2] if square else (0, 0)
        found.append(
            Finding(
                "heads times size",
                str(math.prod(heads)),
                f"{channels}, the model's channels",
                math.prod(heads) == channels,
            )
        )
    return found


def vocabulary(contents: Contents, table: Sequence[bytes], digest: str) -> list[Finding]:
    """Whether a GGUF's tokens are the tokenizer's, and its marks of an end are RWKV's.

    Args:
        contents: of the file.
        table: bytes of every token.
        digest: of the table.
    """
    from rwkv_core.conformance.gguf_file import unescaped

    facts = contents.facts
    texts, types = facts.get("tokenizer.ggml.tokens", []), facts.get("tokenizer.ggml.token_type", [])
    model = facts.get("tokenizer.ggml.model")
    found = [
        Finding("tokenizer", str(model), "rwkv", model == "rwkv"),
        Finding("number of tokens", str(len(texts)), str(len(table)), len(texts) == len(table) == len(types)),
    ]
    wrong = []
    for i, (text, kind, entry) in enumerate(zip(texts, types, table, strict=False)):
        usual = kind == (3 if i == 0 else 5) if not entry else kind in (1, 4) and unescaped(text) == entry
        if not usual:
            wrong.append(f"{i}: {text!r} of type {kind} is {unescaped(text)!r}, of the tokenizer {entry!r}")
    found.append(
        Finding(
            "tokens", _listed(wrong) or f"{len(texts)}, sha256 {digest[:16]}", "the tokenizer's, to the byte", not wrong
        )
    )
    ends = {end: facts.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos", "eot")}
    right = {"bos": 0, "eos": 0, "eot": next((i for i, entry in enumerate(table) if entry == b"\n\n"), None)}
    found.append(
        Finding("bos, eos, eot", _pairs(ends), f"{_pairs(right)}: an answer ends at a blank line", ends == right)
    )
    return [*found, chat_template(facts.get("tokenizer.chat_template"))]


DIALOGUE: list[dict[str, str]] = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "  Where is 长城?\nSay it. "},
    {"role": "assistant", "content": "China."},
    {"role": "user", "content": "And Uluru?"},
]
RENDERED = "System: Answer in one word.\n\nUser: Where is 长城?\nSay it.\n\nAssistant: China.\n\nUser: And Uluru?\n\nAssistant:"


def world_file(folder: Path, table: Sequence[bytes]) -> Finding:
    """Whether the vocabulary file of a Hugging Face folder is the tokenizer's.

    Args:
        folder: it.
        table: bytes of every token.
    """
    what, rule = "vocabulary file", "the tokenizer's tokens, to the byte, but for special ones"
    path = folder / "rwkv_vocab_v20230424.txt"
    found = dict[int, bytes]()
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            number, literal = line[: line.index(" ")], line[line.index(" ") : line.rindex(" ")].strip()
            entry = ast.literal_eval(literal)
            found[int(number)] = entry.encode() if isinstance(entry, str) else bytes(entry)
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        return Finding(what, f"it can't be read ({error})", rule, False)
    wrong = [i for i, entry in enumerate(table) if entry and found.get(i) != entry and i < FREE]
    strange = sorted(i for i in found if i >= len(table) or (i < FREE and not table[i]))
    wrong += strange
    told = f"{len(wrong)} are others, token {wrong[0]} among them" if wrong else f"{len(found)} tokens"
    return Finding(what, told, rule, not wrong)


def chat_template(template: Any) -> Finding:
    """Whether a template writes a dialogue as the training data has it, and as `rwkvflow chat` does."""
    what, rule = "chat template", f"{RENDERED!r} for a dialogue of four turns"
    if not isinstance(template, str) or not template:
        return Finding(what, "none", rule, False)
    if template == "rwkv-world":
        return Finding(what, "rwkv-world, which llama.cpp has built in", rule, True)
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        got = environment.from_string(template).render(
            messages=DIALOGUE, add_generation_prompt=True, bos_token="", eos_token=""
        )
    except TemplateError as error:
        return Finding(what, f"it can't be rendered ({error})", rule, False)
    return Finding(what, "renders it so" if got == RENDERED else repr(got), rule, got == RENDERED)


def _fitted(name: str, stored: Stored, want: Stored) -> Iterator[tuple[Array, Array]] | None:
    """Both tensors in the model's shape, piece by piece; None if they do not fit each other."""
    shape = want.shape
    repeated = len(shape) == 1 and len(stored.shape) == 2 and stored.shape[0] == shape[0] and stored.shape[1] > 1
    if repeated:  # RWKV-5.1 has a value a head, and its .st one a channel
        return iter([(stored.values(), np.broadcast_to(want.values()[:, None], stored.shape))])
    flat = name.endswith(".r_k") and stored.shape == (math.prod(shape),)  # as GGUF has it
    if _squeezed(stored.shape) != _squeezed(shape) and not flat:
        return None
    if len(shape) != 2 or stored.turned or stored.shape != shape or math.prod(shape) <= _PIECE:
        return iter([(np.reshape(stored.values(), shape), want.values())])
    step = max(1, _PIECE // shape[1])
    parts = [slice(at, at + step) for at in range(0, shape[0], step)]
    return ((stored.values(part), want.values(part)) for part in parts)


def _within_steps(got: Array, want: Array) -> bool:
    blocks = np.abs(want.reshape(-1, 32))
    step = blocks.max(-1, keepdims=True) / 127
    return bool((np.abs(got - want).reshape(-1, 32) <= _Q8_STEP * step + 1e-7).all())


def _diagnosis(name: str, stored: Stored, source: Mapping[str, Stored], contents: Contents) -> str:
    """What is most likely wrong with a tensor's values, in words."""
    got, want = stored.values(), source[name].values()

    def alike(x: Array) -> bool:
        return x.size == got.size and np.allclose(
            np.ravel(got), np.ravel(x), rtol=0.02, atol=1e-3 * float(np.abs(x).max())
        )

    if want.ndim > 1 and alike(np.swapaxes(want, -1, -2)):
        return "is not turned as the format wants it"
    times = float(np.abs(got).sum() / max(float(np.abs(want).sum()), 1e-30))
    if (
        name.endswith(HALVED)
        and times > 0
        and abs(math.log2(times) - round(math.log2(times))) < 0.01
        and alike(want * times)
    ):
        return f"is {times:g} times the model's; by what the file says it must be {1 / contents.divisor(name):g} times"
    for other, x in source.items():
        if other != name and _squeezed(x.shape) == _squeezed(source[name].shape) and alike(x.values()):
            return f"has the values of {other}"
    off = np.abs(np.ravel(got) - np.ravel(want)) if got.size == want.size else np.zeros(0)
    return f"has {int((off > 0).sum()):,} other values, off by up to {float(np.nan_to_num(off).max(initial=0)):.3g}"


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _listed(found: Sequence[str]) -> str:
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more
