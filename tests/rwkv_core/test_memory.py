import platform
import subprocess
import sys

import pytest

BLOCKS = 8
PAGES = BLOCKS << 12  # of 4096 bytes: a block is 16 MB

FAULTS = f"""
import resource
import torch
from rwkv_core import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1 << 22) for _ in range({BLOCKS})]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

faults()
print(faults())
with memory.reused():
    faults()
    print(faults())
    held = resident()
print(held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_within_memory_is_reused_and_at_the_end_given_back():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, within, given_back = map(int, done.stdout.split())
    assert within < PAGES / 4 < before
    assert given_back > PAGES / 2


HOLES = """
import torch
from rwkv_core import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1])

torch.ones(1 << 22)  # after this one is freed, glibc takes blocks that are as large from the heap
blocks = [torch.ones(1 << 20) for _ in range(40)]
del blocks[::2]
held = resident()
memory.give_back()
print(held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a function of glibc")
def test_what_is_free_between_blocks_is_given_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 15 * 4 * 256  # pages of 4096 bytes: 15 of the 20 blocks, at least
