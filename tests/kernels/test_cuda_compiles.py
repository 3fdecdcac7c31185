"""Every CUDA source compiles for every GPU on a machine that has none, and asks for no more than that GPU has.

`pytest -s` shows the registers, spills and shared memory of each kernel.
"""

import ctypes
import re
import subprocess
from typing import NamedTuple

import pytest
import torch

from kernels import build
from kernels.wkv7_cuda import SOURCES

FOLDER = build.SOURCES / "cuda"
FILES = sorted(file.stem for file in FOLDER.glob("*.cu"))

GPUS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_120": 99 << 10}
"""By name, the bytes of shared memory that a block may have."""

LARGE = {"wkv7_128": ["sm_90", "sm_120"], "wkv7_256": ["sm_90"]}
"""What takes a minute for each GPU: it is translated once, for the oldest, and assembled for these."""

try:
    NVCC, WHY = build._nvcc()[0], ""
except RuntimeError as error:
    NVCC, WHY = "", str(error)


class Kernel(NamedTuple):
    """What ptxas says of one. Shared memory is what has a fixed size; all memory in bytes."""

    name: str
    gpu: str
    spilled: int
    registers: int
    shared: int


def kernels(said):
    pattern = (
        r"Compiling entry function '(\S+)' for '(sm_\d+)'\n.*\n"
        r".* (\d+) bytes spill stores.*\n.*Used (\d+) registers(?:.*?, (\d+) bytes smem)?"
    )
    for name, gpu, *numbers in re.findall(pattern, said):
        own = re.sub(r"^_ZN\d+_GLOBAL__N__.*?_cu_[0-9a-f]{8}\d+?(?=[a-z])", "", name)
        yield Kernel(own, gpu, *(int(number or 0) for number in numbers))


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason=WHY)
@pytest.mark.parametrize("source", FILES)
def test_every_source_compiles_for_every_gpu_without_a_warning(source, tmp_path, monkeypatch):
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    gpus = [gpu for gpu in LARGE.get(source, GPUS) if gpu in known]  # sm_120 is of CUDA 12.8
    assert gpus
    capabilities = [divmod(int(gpu[3:]), 10) for gpu in gpus]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    command = build._command("cuda")[0]
    if source in LARGE:
        command = [part for part in command if "-gencode" not in part]
        command.append(f"-gencode=arch=compute_80,code=[{','.join(gpus)}]")
    command += ["--threads", "2", "-Xptxas", "-v", "-c", str(FOLDER / f"{source}.cu"), "-o", str(tmp_path / "x.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning" not in said, said
    found = sorted(kernels(said))
    print(*found, sep="\n")
    assert len(found) == said.count("Compiling entry function")
    assert {kernel.gpu for kernel in found} == set(gpus)
    assert all(kernel.registers <= 255 and kernel.shared <= 48 << 10 for kernel in found)


RECORDING = """
#include "device.h"
#undef LAUNCH
#define LAUNCH(...) record_launch(__VA_ARGS__)
static int64_t launches, threads, bytes;
template <class... P, class... A>
int record_launch(void (*)(P...), dim3, dim3 block, size_t shared, int64_t, const A&...) {
    launches++, threads = std::max(threads, int64_t(block.x)), bytes = std::max(bytes, int64_t(shared));
    return 0;
}
#include "SOURCE.cu"
extern "C" void take(int64_t* most) {
    most[0] = launches, most[1] = threads, most[2] = bytes, launches = threads = bytes = 0;
}
"""
"""A source that says what it would launch."""


def record(*fields):
    return (ctypes.c_int64 * len(fields))(*fields)


def launch_wkv6(library, size, is_bf16, _limit):
    shape = (1, 130, 1, size, 1, is_bf16, 0)
    library.rwkv_wkv6_forward(record(*[0] * 10, *shape))
    library.rwkv_wkv6_backward(record(*[0] * 17, *shape))


def launch_wkv7(library, size, is_bf16, limit):
    for parallel in (0, 1):
        plan, shape = record(*[0] * 7), (1, 130, 1, size, is_bf16, parallel)
        library.rwkv_wkv7_plan(record(*shape, 0, limit, ctypes.addressof(plan), 0))
        library.rwkv_wkv7_forward(record(*shape, plan[1], *[0] * 12))
        library.rwkv_wkv7_backward(record(*shape, plan[1], *[0] * 21))


@pytest.mark.parametrize("source", ["wkv6", *SOURCES.values()])
def test_blocks_have_the_shared_memory_that_they_ask_for(source, tmp_path):
    """WKV-4's is of a fixed size."""
    (tmp_path / "recording.cpp").write_text(RECORDING.replace("SOURCE", source))
    made = tmp_path / "recording.so"
    command = [*build._command("host")[0], "-O0", f"-I{FOLDER}", "-shared", str(tmp_path / "recording.cpp")]
    subprocess.run([*command, "-o", str(made)], check=True, capture_output=True)
    library, most = ctypes.CDLL(str(made)), record(0, 0, 0)
    largest = next((size for size, name in SOURCES.items() if name == source), 256)
    for size in range(8, largest + 1, 8):
        for limit in set(GPUS.values()):
            for is_bf16 in (0, 1):
                (launch_wkv6 if source == "wkv6" else launch_wkv7)(library, size, is_bf16, limit)
                library.take(most)
                launches, threads, shared = most
                assert launches >= 4
                assert threads <= 1024
                assert shared <= limit, (size, is_bf16)
