"""Processes that work for this one, and do not outlive it."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


FIRST = "RWKVFLOW_FIRST"
"""Environment variable of the processes that a training has started beside itself: the id of the one that started them."""


def is_first() -> bool:
    """Whether this process speaks for those that share a training: it writes, prints and ends with the exit code.

    The variables are those of torchrun, Slurm and Lightning; a process that shares nothing has none of them, or 0.
    """
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def stop_with_parent(number: int = signal.SIGTERM) -> None:
    """Be sent a signal when the parent dies: a process must not live on unseen, and hold a card or a file."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def stop_with_first() -> None:
    """As a process beside the first: be killed when it dies. One that waits for the others' part would never see a signal."""
    first = os.environ.get(FIRST)
    if first is None:  # torchrun or Slurm has started this one, and ends it
        stop_with_parent()
        return
    stop_with_parent(signal.SIGKILL)
    if os.getppid() != int(first):  # it died while this process was starting
        os._exit(1)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def pool(processes: int, ready: Callable[[], object]) -> Iterator[Executor]:
    """So many processes, begun from nothing: a fork would have the locks of this one's threads.

    Args:
        processes: how many.
        ready: what each calls first, when the block begins: what it loads is there when there is work.
    """
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, context, _begin, (os.getpid(), ready))
    for _ in range(processes):
        executor.submit(int)  # a process begins when there is something to do
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(parent: int, ready: Callable[[], object]) -> None:
    stop_with_parent()
    if os.getppid() != parent:  # it died while this process was starting
        os._exit(1)
    # Ctrl+C reaches all of a terminal's processes; this one's parent ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ready()
