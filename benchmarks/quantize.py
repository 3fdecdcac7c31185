"""Packed matrices: their size, their error beside bitsandbytes' own, and what unpacking costs beside a product.

python -m benchmarks.quantize [--threads N] [--rounds N] [--rows M] [--out FILE]

Of a matrix of normal values and one of heavy tails (Student's t, 4 degrees of freedom), as RWKV-7 0.1B's ffn.key: (3072, 768).
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.machine import describe, parser, pin, tell
from rwkv_core.quantize import Form, Packed, product

SHAPE = (3072, 768)
FORMS: list[Form] = [form for form in get_args(Form) if form != "none"]


def matrices() -> dict[str, Tensor]:
    """By the distribution of their values."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SHAPE, generator=generator)
    squares = torch.randn((4, *SHAPE), generator=generator).square().mean(0)
    return {"normal": normal, "heavy tails": torch.randn(SHAPE, generator=generator) / squares.sqrt()}


def error(got: Tensor, want: Tensor) -> float:
    """Relative, of the whole tensor."""
    return float((got - want).norm() / want.norm())


def bitsandbytes(weight: Tensor, form: Form) -> float | None:
    """Its own error, where it is there and has the format."""
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return None
    kind = form.removesuffix("-double")
    if kind in ("nf4", "fp4"):
        double = form.endswith("-double")
        codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
        return error(bnb.dequantize_4bit(codes, state), weight)
    if form == "int8":
        return error(bnb.dequantize_blockwise(*bnb.quantize_blockwise(weight, blocksize=256)), weight)
    if form == "int8-double":
        return None  # its nested statistics have the blocks of the values, not of 256 as for 4 bits
    return None


def times(makes: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians in seconds; all take turns."""
    took: dict[str, list[float]] = {name: [] for name in makes}
    for _ in range(rounds + 2):
        for name, make in makes.items():
            begin = time.perf_counter()
            make()
            took[name].append(time.perf_counter() - begin)
    return {name: median(values[2:]) for name, values in took.items()}


def measure(rounds: int, rows: int) -> str:
    """The table."""
    weights = matrices()
    lines = [
        f"A product of {rows} rows with a packed ({SHAPE[0]}, {SHAPE[1]}) is measured against the same with float32.",
        "",
        "| | bits a value | error, normal | bitsandbytes | error, heavy tails | bitsandbytes | packed in ms | / float32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    weight, x = weights["normal"], torch.randn(rows, SHAPE[1])
    for form in FORMS:
        packed = {name: Packed(w, form) for name, w in weights.items()}
        one = packed["normal"]
        t = times(
            {
                "pack": lambda form=form: Packed(weight, form),
                "packed": lambda one=one: product(x, one),
                "plain": lambda: product(x, weight),
            },
            rounds,
        )
        errors = " | ".join(
            f"{error(packed[name].unpacked(), w):.5f} | {'' if (own := bitsandbytes(w, form)) is None else f'{own:.5f}'}"
            for name, w in weights.items()
        )
        lines.append(
            f"| {form} | {8 * one.nbytes / weight.numel():.3f} | {errors} | {t['pack'] * 1e3:.1f} | "
            f"{t['packed'] / t['plain']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=512, help="of the product: tokens")
    given = options.parse_args()
    pin(given.threads)
    tell(f"{describe()}; medians of {given.rounds}\n\n{measure(given.rounds, given.rows)}\n", given.out)


if __name__ == "__main__":
    main()
