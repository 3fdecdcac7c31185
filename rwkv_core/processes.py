"""Processes that work for this one, and do not outlive it."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import forkserver

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


READY = "RWKVFLOW_READY"
"""Environment variable of the server that forks a pool's processes: what it calls first, pickled, in hexadecimal."""

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
    """So many processes, forked when there is work by a server that is begun at once, and has called `ready` before.

    What `ready` loads is in memory once, and in the cores' common cache. A fork of this process could have the locks of its
    threads; that server has none but OpenBLAS's, which end before a fork. It ends with this process.

    Args:
        processes: how many.
        ready: of a module that can be imported. Should it fail, it is called again in each process.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["rwkv_core.before_fork"])
    os.environ[READY] = pickle.dumps(ready).hex()
    try:
        forkserver.ensure_running()
    finally:
        del os.environ[READY]
    executor = ProcessPoolExecutor(processes, server, _begin, (ready,))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(ready: Callable[[], object]) -> None:
    # Ctrl+C reaches all of a terminal's processes; this one's parent ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    ready()


def _end_with_parent() -> None:
    """Of the process that asked for this one; the one that forked it waits for all that were asked for to end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
