"""Memory: how much there is, and what is freed of it: kept for the next step, or given back."""

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of settings, as malloc.h has them."""

_LARGEST = 32 << 20
"""Bytes of a block on the heap at most: glibc allows no more."""


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """Within, the C library keeps what is freed of its heap; at the end it gives that back to the system.

    By itself glibc gives back what lies at the heap's end. The system fills each page with zeros before it gives it out again,
    which takes as long as some kernels do. Where the C library has no such settings this does nothing.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGEST)  # without it, what the other setting finds would hold
    library.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)  # as glibc itself does once blocks so large were freed
        library.malloc_trim(0)


def give_back() -> None:
    """What is free of the heap goes back to the system, wherever it lies.

    torch asks for memory at aligned places. A block that was freed is then a little too short for the next of its size: as
    matrix after matrix is made and freed, glibc's heap grows as if all of them were kept.
    """
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def available(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: of the machine, and of the control groups that it is in.

    Args:
        root: where the system's files are.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux; what others use can't be told
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text(encoding="utf-8"))
    free = [int(found[1]) * 1024] if found else [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    for group in _groups(root):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, used = _number(group / limit), _number(group / usage)
            if most is not None and used is not None:
                statistics = group / "memory.stat"
                text = statistics.read_text(encoding="utf-8") if statistics.exists() else ""
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)$", text, re.MULTILINE
                )  # given up when it is wanted
                free.append(max(0, most - used + (int(cached[1]) if cached else 0)))
    return min(free)


def resident() -> int:
    """Bytes that this process has in memory now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s*(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups of this process that count memory, and of those around them."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inner = top / path.lstrip("/")
        for group in (inner, *inner.parents):
            yield group
            if group == top:
                break


def _number(file: Path) -> int | None:
    """What a file says, if there is one and it is no word such as max."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it has these functions."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
