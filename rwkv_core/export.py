"""Files for clients, and a check of every file that is written.

A model goes through tensor by tensor, as it is written and as it is read back: no file is ever whole in memory.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_core import checkpoint, huggingface_folder, models
from rwkv_core.checkpoint import Dtype
from rwkv_core.config import FormatsConfig
from rwkv_core.errors import InputError, Problem
from rwkv_core.files import sha256
from rwkv_core.formats import container, gguf, huggingface, order, q8_0, tuned_state, web_rwkv
from rwkv_core.models.rwkv7 import RWKV7
from rwkv_core.models.skeleton import Shape
from rwkv_core.tokenizer import VOCAB_SIZE, world

_GB = 10**9

STATES = {"pth": "state.pth", "st": "model.state", "hf": "state.fla.safetensors"}
"""Where a tuned state is written, by format; Ai00 wants the ending .state. llama.cpp mounts none."""


class _Source(NamedTuple):
    """What is exported."""

    tensors: dict[str, Tensor]
    as_loaded: Dtype
    """What that means for a .pth: the matrices of a GGUF are of one dtype, and all else of another."""
    shape: Shape
    tokenizer: str
    special: Mapping[str, int]


class _Target(NamedTuple):
    """A file or a folder that is made."""

    name: str
    write: Callable[[Path], None]
    holds: torch.dtype | None
    """What the values must fit; None is each tensor's own."""
    forms: Callable[[str], tuple[bool, float]] = lambda _: (False, 0.0)
    """Of a tensor: whether it is packed, and how far a value may be from what it was besides the rounding of its dtype."""
    left_out: Sequence[str] = ()


def export(
    model: Path,
    out: Path,
    config: FormatsConfig,
    *,
    state: Path | None = None,
    tokenizer: str = "world",
    special: Mapping[str, int] | None = None,
    head_size_divisor: float | None = None,
) -> dict[str, Any]:
    """Write `model` in each of the formats into the folder `out`, read each file back, and report.

    Args:
        model: what `checkpoint.read` takes.
        out: the folder.
        config: the formats, and what is to be chosen in them. A state file keeps its own precision, as its readers take
            bfloat16 and float32 alone.
        state: a file of a tuned state to write beside it, for clients: without its token shift, if it has that.
        tokenizer: as in the training's `data.tokenizer`.
        special: texts that are a token each, as in the training's `data.special_tokens`; none are those that `model` says.
        head_size_divisor: as of `models.load`.

    Returns:
        The digests of `model` and `state`, and for each file ("pth", "st", "gguf-f16", "hf", ...): its name, digest and size,
        and what reading it back gave; the same of the state. What clients compute with both is for `conformance` to find.
        The special tokens, if there are any: a .pth and a .st have no place for them.

    Raises:
        InputError: the model can't be read, a client has no such model, or a value does not fit the format's precision.
        WorldError: there is no room, or no permission, or a package is missing.
    """
    special = special or checkpoint.special_tokens(model)
    source = _source(model, tokenizer, special, head_size_divisor)
    made_of = {"sha256": sha256(model)}
    report = {name: _export(source.tensors, out, target) for name, target in _targets(source, config).items()}
    if state is not None:
        made_of["state_sha256"] = sha256(state)
        tuned = tuned_state.for_clients(checkpoint.read(state))
        for name in (form for form in config.formats if form in STATES):
            report[name]["state"] = _export(tuned, out, _state(name, tuned))
    return {"merged": made_of, "formats": report} | ({"special_tokens": dict(special)} if special else {})


def export_state(state: Path, out: Path, formats: Sequence[str]) -> dict[str, Any]:
    """Write a tuned state for the clients of each format into the folder `out`, read each file back, and report.

    Raises:
        InputError: it is no state, a format has none, or a value does not fit its precision.
        WorldError: there is no room, or no permission, or a package is missing.
    """
    tuned = tuned_state.for_clients(checkpoint.read(state))
    if not tuned:
        raise InputError(str(state), "must have att.time_state of each block", "give a tuned state")
    without = next((form for form in formats if form not in STATES), None)
    if without is not None:
        raise InputError(f"{without} of a state", "its clients mount none", f"take {', '.join(STATES)}")
    return {
        "state": {"sha256": sha256(state)},
        "formats": {form: _export(tuned, out, _state(form, tuned)) for form in formats},
    }


def is_state(path: Path) -> bool:
    """Whether a file holds a tuned state and nothing else."""
    names = checkpoint.read(path) if path.is_file() else {}
    return bool(names) and all(map(tuned_state.is_part, names))


def _source(model: Path, tokenizer: str, special: Mapping[str, int], head_size_divisor: float | None) -> _Source:
    tensors = checkpoint.read(model)
    version, divisor = models.version_of(tensors, model), models.divisor(model, head_size_divisor)
    state = next((name for name in tensors if tuned_state.is_part(name)), None)
    if version is RWKV7 and state is not None:
        raise InputError(
            f"{model} has {state}",
            "of RWKV-7 clients read a state from a file of its own",
            "export the model without it",
        )
    as_loaded: Dtype = "fp32" if model.suffix == gguf.SUFFIX and widest(tensors) == torch.float32 else "as_loaded"
    try:
        return _Source(tensors, as_loaded, version.shape_of(tensors, divisor), tokenizer, special)
    except (KeyError, ValueError) as error:
        raise InputError(f"{model}: {error}", "the sizes must fit together", "give a whole checkpoint") from None


def _targets(source: _Source, config: FormatsConfig) -> dict[str, _Target]:
    """What is to be made, by the name that the report has for it. What no client reads is refused here, before work starts.

    Raises:
        InputError: a format has no place for the model.
        WorldError: a package is missing.
    """
    targets: dict[str, _Target] = {}
    for form in config.formats:
        match form:
            case "pth":
                dtype = source.as_loaded if config.dtype == "as_loaded" else config.dtype
                targets[form] = _pth("model.pth", order.official(source.tensors), dtype)
            case "st":
                targets[form] = _st("model.st", source.tensors)
            case "gguf":
                targets |= {f"gguf-{kind}": _gguf(source, kind) for kind in config.gguf}
            case "hf":
                targets[form] = _hf(source, config.hf.dtype, int(config.hf.part_gb * _GB))
    return targets


def _pth(name: str, tensors: Mapping[str, Tensor], dtype: Dtype) -> _Target:
    return _Target(name, lambda path: checkpoint.write(path, tensors, dtype), checkpoint.DTYPES.get(dtype))


def _st(name: str, tensors: Mapping[str, Tensor]) -> _Target:
    web_rwkv.check(tensors)
    return _Target(name, lambda path: web_rwkv.write(path, tensors), torch.float16)


def _gguf(source: _Source, form: gguf.Form) -> _Target:
    tensors, divisor = source.tensors, source.shape.head_size_divisor
    if source.tokenizer != "world":
        raise InputError(
            f"gguf of a model of the tokenizer {source.tokenizer}", "llama.cpp has World's", "export pth or hf"
        )
    gguf.check(tensors, form, VOCAB_SIZE, divisor)
    gguf.library()
    millions = sum(x.numel() for x in tensors.values()) / 1e6
    write = partial(
        gguf.write, tensors=tensors, form=form, table=world().table, special=_checked(source.special),
        head_size_divisor=divisor, name=f"RWKV-{source.shape.version} {millions:.0f}M",
    )  # fmt: skip
    holds = torch.float16 if form in ("f16", "q8_0") else None
    return _Target(
        f"model-{form}.gguf", write, holds, partial(gguf.stored, form=form, tensors=tensors), _first_v(tensors)
    )


def _hf(source: _Source, dtype: Dtype, part_bytes: int) -> _Target:
    tensors, of_world = source.tensors, source.tokenizer == "world" and source.shape.vocab_size == VOCAB_SIZE
    chosen = checkpoint.DTYPES.get(dtype) or widest(tensors)
    huggingface.config(source.shape, chosen)
    write = partial(
        huggingface_folder.write, tensors=tensors, shape=source.shape, dtype=chosen, part_bytes=part_bytes,
        table=world().table if of_world else (), special=_checked(source.special) if of_world else None,
        tokenizer=None if source.tokenizer in ("world", "bytes") else Path(source.tokenizer),
    )  # fmt: skip
    # an eighth of what float16 holds in full, for `huggingface.RECEPTANCE`
    slack = 2.0**-22 if source.shape.version == "6" and chosen == torch.float16 else 0.0
    return _Target(
        "hf", write, chosen, lambda name: (False, slack * name.endswith(".att.receptance.weight")), _first_v(tensors)
    )


def _state(form: str, tuned: Mapping[str, Tensor]) -> _Target:
    match form:
        case "pth":
            return _pth(STATES[form], tuned, "as_loaded")
        case "st":
            return _st(STATES[form], tuned)
    return _Target(STATES[form], lambda path: huggingface.write_state(path, tuned), torch.float32)


def _checked(special: Mapping[str, int]) -> Mapping[str, int]:
    world().with_special(special)
    return special


def _first_v(tensors: Mapping[str, Tensor]) -> list[str]:
    """What RWKV-7 may have in its first block and never uses: neither llama.cpp nor fla keeps it."""
    return [name for name in tensors if name in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")]


def widest(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that holds every value: that of all, or float32 where they differ, as in a GGUF."""
    found = {x.dtype for x in tensors.values() if x.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


def _export(tensors: Mapping[str, Tensor], out: Path, target: _Target) -> dict[str, Any]:
    """Write a file or a folder, read it back, and report."""
    path = out / target.name
    checkpoint.check_values(tensors, target.holds)
    target.write(path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    wanted = {name: x for name, x in tensors.items() if name not in target.left_out}
    return {
        "file": target.name,
        "sha256": sha256(path),
        "bytes": sum(file.stat().st_size for file in files),
        **_check(wanted, checkpoint.each(path), target.forms),
    }


def _check(
    source: Mapping[str, Tensor], back: Iterable[tuple[str, Tensor]], forms: Callable[[str], tuple[bool, float]]
) -> dict[str, Any]:
    """What the conversion and its inverse have left of every tensor."""
    largest, flushed, seen = 0.0, 0, set[str]()
    mapped = container.mapped_files()
    for name, y in back:
        seen.add(name)
        x = source.get(name)
        if x is None:
            break
        if x.shape != y.shape:
            raise Problem(
                f"{name} came back as {tuple(y.shape)}", f"it was {tuple(x.shape)}", "report this as a defect"
            )
        packed, slack = forms(name)
        for exact, got in zip(_some_rows(x), _some_rows(y), strict=True):
            change = _change(name, exact, got, packed, slack)
            if change is not None:
                largest = max(largest, float(change.max()))
                flushed += int(torch.count_nonzero(exact)) - int(torch.count_nonzero(got))
        container.let_go(x, mapped)
    if seen != source.keys():
        missing = sorted(seen ^ source.keys())
        raise Problem(
            f"tensors {', '.join(missing[:3])}", "an export must hold every tensor", "report this as a defect"
        )
    total = sum(x.numel() for x in source.values())
    return {"tensors": len(source), "parameters": total, "largest_rounding": largest, "flushed_to_zero": flushed}


def _some_rows(x: Tensor) -> Sequence[Tensor]:
    """A tensor in parts of some rows, so that what is computed of one stays in the processor's cache."""
    return torch.split(x, max(1, container.PIECE // max(1, x[0].numel()))) if x.ndim and x.numel() else (x,)


def _change(name: str, exact: Tensor, got: Tensor, packed: bool, slack: float) -> Tensor | None:
    """How far each value is from what it was; None if all are what they were."""
    same = not packed and container.same_bits(exact.to(got.dtype), got)
    if same and torch.promote_types(exact.dtype, got.dtype) == got.dtype:
        return None
    wide = exact.to(torch.float32)
    change = (wide - got).abs_()
    if same:
        return change
    far = change > (q8_0.error(wide).add_(slack) if packed else slack)
    if bool((far if packed else far & (exact.to(got.dtype) != got)).any()):
        raise Problem(f"{name} came back changed", "by more than its rounding", "report this as a defect")
    return change
