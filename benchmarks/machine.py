"""What a measurement was made on, in a line: numbers mean nothing without it."""

import argparse
import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """Processor, cores, memory, torch and its instruction set."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, "
        f"{memory:.0f} GiB, Python {platform.python_version()}, torch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads){gpu}"
    )


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of what every measurement is told; `doc` is its module's."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--out", type=Path, help="also write the tables to this file")
    return made


def pin(threads: int) -> None:
    """Work with so many threads, on as many processors."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def tell(text: str, out: Path | None) -> None:
    """Print the tables, and write them to `out`."""
    print(text)
    if out:
        out.write_text(text, encoding="utf-8")
