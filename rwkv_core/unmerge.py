"""An adapter out of two checkpoints: what was changed between them, as nearly as a rank allows.

    D = tuned - base ~ U S V'        A = sqrt(S) V', B = U sqrt(S), alpha = rank: base + B A is merged from it

No product of that rank is nearer to D in the Frobenius norm (Eckart and Young 1936); what is left out is measured. Source of
the randomised decomposition: Halko et al. 2011, arXiv:0909.4061.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_core import checkpoint, models
from rwkv_core.adapters import file, inner, is_matrix, layer, layer_count, select
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.adapters.linear import wide
from rwkv_core.adapters.pissa import balanced, principal
from rwkv_core.config import AdapterConfig, FullConfig, LoraConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256

_SMALL = 256
"""Side of a matrix up to which the exact decomposition is the faster one."""

_ITERATIONS, _SPARE = 4, 10
"""Of the randomised one: power iterations, and directions beyond the rank at least. Halko et al. advise 2 and 5 to 10."""


@torch.no_grad()
def unmerge(base: Path, tuned: Path, out: Path, *, rank: int) -> dict[str, Any]:
    """Write the adapter that, merged into base, comes as near to tuned as a LoRA of this rank can.

    Matrices inside blocks become LoRA's; every other tensor that differs is kept whole, the embedding and the head too.

    Args:
        base: a file or a folder.
        tuned: likewise, of the same model.
        out: the file to write.
        rank: of the LoRA.

    Returns:
        The receipt: digests, and of each matrix what share of its change is left out, as norms: 0 is nothing, 1 all of it.

    Raises:
        InputError: a file can't be read or would be overwritten; the two are not of one shape, or are equal; a value is not
            finite; or the rank is more than a matrix has.
    """
    if out.resolve() in {base.resolve(), tuned.resolve()}:
        raise InputError(str(out), "it is read, and would be overwritten", "name another file")
    before, after = checkpoint.read(base), checkpoint.read(tuned)
    _check_alike(base, before, tuned, after)
    after = {name: after[name] for name in before}
    changed = [name for name, x, y in _pairs(before, after) if not _same(x, y)]
    if not changed:
        raise InputError(str(tuned), f"its tensors are those of {base}", "give the one that was tuned")
    config = _config(before, changed, rank)
    adapted, also = select(config, before)
    matrices = {f"{module}.weight": module for module in adapted}
    about = {}
    for name, x in before.items():
        if name in matrices:
            about[f"{matrices[name]}.lora_A"] = torch.Size((rank, x.shape[1])), wide(x)
            about[f"{matrices[name]}.lora_B"] = torch.Size((x.shape[0], rank)), wide(x)
        elif name in also:
            about[name] = x.shape, after[name].dtype
    squares: dict[str, Sequence[float]] = {}

    def parts() -> Iterator[Tensor]:
        for name, x, y in _pairs(before, after):
            if name in matrices:
                a, b, *both = _factors(f"{tuned}: {name}", x, y, rank)
                squares[name] = both
                yield a
                yield b
            elif name in also:
                yield y

    digest = sha256(base)
    record = AdapterRecord(
        format=1, adapter=config, base_sha256=digest, data_sha256=None, vocabulary_sha256=None, run=None
    )
    file.write_each(out, about, parts(), record)
    return {
        "base": {"path": str(base), "sha256": digest},
        "tuned": {"path": str(tuned), "sha256": sha256(tuned)},
        "adapter": {"sha256": sha256(out), "bytes": out.stat().st_size, "settings": config.model_dump(mode="json")},
        "tensors_kept_whole": len(also),
        "left_out": _share(list(squares.values())),
        "left_out_of": {name: _share([pair]) for name, pair in squares.items()},
    }


def _pairs(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Both of each name, mapped, a pair at a time."""
    for (name, x), (_, y) in zip(checkpoint.one_by_one(before), checkpoint.one_by_one(after), strict=True):
        yield name, x, y


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether all values are equal, in whatever precision."""
    return torch.equal(x, y) if x.dtype == y.dtype else torch.equal(x.to(wide(x)), y.to(wide(x)))


def _config(tensors: Mapping[str, Tensor], changed: Sequence[str], rank: int) -> AdapterConfig:
    """The method that trains just these, or a few more: what is adapted in one of the blocks is in all that are named."""
    matrices = [name for name in changed if is_matrix(name, tensors[name])]
    numbers = sorted({number for name in changed if (number := layer(name)) is not None})
    everywhere = len(numbers) in (0, layer_count(tensors))
    beside: dict[str, Any] = {
        "layers": "all" if everywhere else " ".join(map(str, numbers)),
        "also": tuple(dict.fromkeys(inner(name) for name in changed if name not in matrices)),
        "state": "none",
        "load": None,
    }
    if not matrices:
        return FullConfig(kind="full", **beside)
    targets = tuple(dict.fromkeys(inner(name).removesuffix(".weight") for name in matrices))
    return LoraConfig(
        kind="lora", rank=rank, targets=targets, alpha=rank, rank_stabilized=False, dropout=0.0, dora=False, **beside
    )


def _factors(where: str, x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """A and B, the square of the norm of what they leave out, and of the whole change."""
    if rank > min(x.shape):
        raise InputError(f"--rank {rank}", f"{where} is {tuple(x.shape)}: at most {min(x.shape)}", "say less")
    change = y.to(wide(x), copy=True)
    change -= x
    whole = _square(change)
    if not math.isfinite(whole):
        raise InputError(where, "all values must be finite", "this model is broken: train it anew")
    spare = max(_SPARE, rank // 2)
    if min(x.shape) <= max(_SMALL, 2 * (rank + spare)):
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        a, b = balanced(u[:, :rank], s[:rank], vh[:rank])
    else:
        a, b = principal(change, rank, _ITERATIONS, 0, spare)
    return a, b, _square(change.addmm_(b, a, alpha=-1)), whole


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _share(squares: Sequence[Sequence[float]]) -> float:
    """What is left out of the whole, as norms, given squares of both; where nothing changed, nothing is left out."""
    out, whole = sum(x[0] for x in squares), sum(x[1] for x in squares)
    return math.sqrt(out / whole) if whole else 0.0


def _check_alike(base: Path, before: Mapping[str, Tensor], tuned: Path, after: Mapping[str, Tensor]) -> None:
    """Refuse what is not one model, before and after.

    Raises:
        InputError: of another version, number of layers or vocabulary, or with other names or shapes.
    """
    facts: list[tuple[str, Any, Any]] = [
        ("is an", models.version_of(before, base).__name__, models.version_of(after, tuned).__name__),
        ("has this number of layers:", layer_count(before), layer_count(after)),
        ("has a vocabulary of", len(before.get("emb.weight", ())), len(after.get("emb.weight", ()))),
    ]
    for name in [*before, *(name for name in after if name not in before)]:
        one, other = (tuple(x[name].shape) if name in x else "nowhere" for x in (before, after))
        facts.append((f"has {name}", one, other))
    for what, one, other in facts:
        if one != other:
            raise InputError(
                f"{tuned} {what} {other}",
                f"{base} {what} {one}: they must be equal",
                "give the model that it was tuned from",
            )
