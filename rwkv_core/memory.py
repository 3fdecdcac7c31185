"""Memory that is freed: kept for the next step, or given back."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

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


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it has these functions."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
