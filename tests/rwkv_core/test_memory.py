import platform
import subprocess
import sys

import pytest

from rwkv_core import memory

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


def system(root, **files):
    """Files of a system, by path with two underscores for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = {"proc__meminfo": "MemTotal: 2000 kB\nMemAvailable:   1000 kB\n"}


def test_there_is_what_the_machine_has(tmp_path):
    assert memory.available(system(tmp_path, **MACHINE)) == 1000 * 1024


def test_there_is_what_the_groups_leave(tmp_path):
    """Of the group and of those around it; what its files take in the cache is given up when it is wanted."""
    root = system(
        tmp_path, **MACHINE, proc__self__cgroup="0::/outer/inner\n",
        sys__fs__cgroup__outer__memory_DOT_max="600000", sys__fs__cgroup__outer__memory_DOT_current="500000",
        sys__fs__cgroup__outer__inner__memory_DOT_max="max", sys__fs__cgroup__outer__inner__memory_DOT_current="1",
    )  # fmt: skip
    assert memory.available(root) == 100_000
    system(root, sys__fs__cgroup__outer__memory_DOT_stat="anon 1\ninactive_file 50000\n")
    assert memory.available(root) == 150_000
    system(root, sys__fs__cgroup__outer__memory_DOT_current="700000")
    assert memory.available(root) == 0


def test_older_groups_count_each_thing_apart(tmp_path):
    root = system(
        tmp_path, **MACHINE, proc__self__cgroup="5:cpu:/a\n4:memory:/job\n",
        sys__fs__cgroup__memory__job__memory_DOT_limit_in_bytes="400000",
        sys__fs__cgroup__memory__job__memory_DOT_usage_in_bytes="100000",
    )  # fmt: skip
    assert memory.available(root) == 300_000
