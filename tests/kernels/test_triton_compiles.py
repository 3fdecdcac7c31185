"""Every Triton kernel compiles for every GPU, as its operator launches it, on a machine that has none.

The operators run on the CPU, forward and backward, under a driver that names a GPU: what they launch is compiled for it, and
not started. That is done in a process of its own, with this file as a script: in pytest's, conftest.py has Triton interpret.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]


class GPU(NamedTuple):
    target: tuple[str, int | str, int]
    """of Triton's GPUTarget: backend, architecture, lanes of a warp"""
    shared: int
    """bytes of shared memory that a program may have"""


GPUS = {
    "sm_80": GPU(("cuda", 80, 32), 163 << 10),
    "sm_90": GPU(("cuda", 90, 32), 227 << 10),
    "sm_120": GPU(("cuda", 120, 32), 99 << 10),
    "gfx942": GPU(("hip", "gfx942", 64), 64 << 10),
}


class Case(NamedTuple):
    """What an operator is given: sizes, the dtype of activations, and that of parameters."""

    batch: int
    steps: int
    heads: int
    size: int
    dtype: torch.dtype
    stored: torch.dtype


CASES = {
    "float32": [Case(1, 96, 128, 64, torch.float32, torch.float32)],
    "bfloat16": [Case(1, 96, 128, 64, torch.bfloat16, torch.bfloat16)],
    "others": [
        Case(1, 33, 3, 128, torch.float32, torch.float32),
        Case(1, 33, 3, 128, torch.float16, torch.float16),
        Case(1, 1, 1, 40, torch.bfloat16, torch.float32),  # mixed precision; and Triton makes constants of what is 1
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "cases"),
    [  # sm_89 has the instructions of sm_80 and the memory of sm_120
        ("sm_80", "bfloat16"),
        ("sm_90", "float32 bfloat16 others"),
        ("sm_120", "bfloat16"),
        ("gfx942", "bfloat16"),
    ],
)
def test_every_kernel_compiles_and_has_the_memory_that_it_needs(gpu, cases, tmp_path):
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    env |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}  # empty, so that all is compiled anew
    command = [sys.executable, "-W", "ignore", __file__, gpu, *cases.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    shared = json.loads(done.stdout)
    print(gpu, cases, json.dumps(shared, indent=1))
    assert {kernel: size for kernel, size in shared.items() if size > GPUS[gpu].shared} == {}


def main(gpu, *cases):
    """Print the most shared memory that each kernel needs, in bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget(*GPUS[gpu].target)

    class Driver:
        def get_current_target(self):
            return target

        def get_current_device(self):
            return 0

        def get_current_stream(self, _device):
            return 0

    shared, errors, run = {}, [], JITFunction.run

    def compile_instead(kernel, *xs, grid, warmup, **constants):
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        try:
            done = run(kernel, *xs, grid=grid, warmup=True, **constants)
            assert done.asm["cubin" if target.backend == "cuda" else "hsaco"]
            shared[name] = max(done.metadata.shared, shared.get(name, 0))
        except Exception as error:
            errors.append(f"{name} {[getattr(x, 'dtype', x) for x in xs]} {constants}: {error}")

    driver.set_active(Driver())
    JITFunction.run = compile_instead
    torch.version.hip = "6" if target.backend == "hip" else None
    for case in (case for name in cases for case in CASES[name]):
        launch(case)
    if errors:
        sys.exit("\n\n".join(errors))

    kernels = set()
    for file in sorted((ROOT / "kernels").glob("*_triton.py")):
        module = importlib.import_module(f"kernels.{file.stem}")
        functions = {name: f for name, f in vars(module).items() if isinstance(f, JITFunction)}
        called = " ".join(re.sub(r"def \w+\(", "", f.src) for f in functions.values())
        own = [name for name, f in functions.items() if f.fn.__module__ == module.__name__]
        kernels |= {f"{module.__name__}.{name}" for name in own if not re.search(rf"\b{name}\(", called)}
    assert set(shared) == kernels, f"not launched: {sorted(kernels - set(shared))}"
    print(json.dumps(shared))


def launch(case):
    """Every operator as a model calls it. The values do not matter: nothing computes with them."""
    from kernels import channel_mix, head_loss, time_mix7, token_shift, wkv4, wkv6, wkv7

    batch, steps, heads, size, dtype, stored = case
    rows, channels = batch * steps, heads * size
    flat, split = (batch, steps, channels), (batch, steps, heads, size)

    def activations(count, *shape):
        return [torch.zeros(shape, dtype=dtype) for _ in range(count)]

    def parameters(count, *shape):
        return [torch.zeros(shape, dtype=stored) for _ in range(count)]

    state = torch.zeros(batch, heads, size, size)
    learn(wkv7, *activations(1, *split), *parameters(1, *split), *activations(4, *split), state)
    learn(wkv6, *activations(3, *split), *parameters(1, *split), *parameters(1, heads, size), state)
    if size > 64:  # which is nothing to the others: they see channels
        return
    learn(wkv4, *activations(2, *flat), *parameters(2, channels), torch.zeros(batch, 3, channels))
    learn(channel_mix, *activations(1, *flat))

    prepare, readout = partial(time_mix7.apply_prepare, size=size), partial(time_mix7.apply_readout, eps=1e-5)
    learn(prepare, *activations(5, *flat), *parameters(2, channels), frozen=2)
    learn(prepare, *activations(2, *flat), None, *activations(1, *flat), None, *parameters(2, channels))
    vectors = [*parameters(2, channels), *parameters(1, heads, size)]
    learn(readout, *activations(4, *split), *activations(1, *flat), *vectors, frozen=3)

    def mix(form, x, last, *mus, norm=()):
        return token_shift.apply(form, x, last, mus, norm and token_shift.Norm(*norm, 1e-5))

    def normed(form, x, last, *xs):
        return mix(form, x, last, *xs[:-2], norm=xs[-2:])

    with torch.autocast("cpu", dtype, enabled=dtype != stored):
        learn(mix, *parameters(1, *flat), *parameters(1, batch, channels), *parameters(1, channels))
        learn(normed, *parameters(1, *flat), *parameters(1, batch, channels), *parameters(8, channels), frozen=8)

    head_loss.slow_in = lambda _: False  # as on a GPU
    hidden, weight = *activations(1, rows, 8), *parameters(1, 65536 if size == 64 else 277, 8)
    for token_weight in (None, torch.ones(rows)):
        targets = torch.zeros(rows, dtype=torch.int64)
        learn(partial(head_loss.apply, targets=targets, l2_wrap=0.1, token_weight=token_weight), hidden, weight)


def learn(operator, *xs, frozen=0):
    """Forward alone, forward and backward, and the same with the last `frozen` inputs without gradients."""
    op = partial(getattr(operator, "apply", operator), "triton")
    op(*xs)
    for trained in {len(xs), len(xs) - frozen}:
        ys = op(*(x if x is None else x.detach().requires_grad_(i < trained) for i, x in enumerate(xs)))
        ys = [y for y in flatten(ys) if y.requires_grad]
        torch.autograd.backward(ys, [torch.zeros_like(y) for y in ys])


def flatten(ys):
    return [ys] if isinstance(ys, torch.Tensor) else [y for some in ys for y in flatten(some)]


if __name__ == "__main__":
    main(*sys.argv[1:])
