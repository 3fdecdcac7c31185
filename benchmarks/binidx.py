"""binidx: writing, joining, and opening and reading one of any size, whose tokens are a hole in the file.

python -m benchmarks.binidx [DOCUMENTS ...]      of 500 tokens; 100 M documents have an index of 2 GB

Each opening is a process of its own, of which the index is not in the system's memory. Memory is the process's own, without
mapped pages.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import describe
from rwkv_core.data.binidx import Writer, concatenate

ROOT = Path(__file__).parent.parent
TOKENS = 500
PIECE = 1_000_000

CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
from rwkv_core.data.binidx import Documents
def memory():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("RssAnon")) / 1000
before = memory()
began = time.perf_counter()
documents = Documents(Path(sys.argv[1]))
opened = time.perf_counter() - began
numbers = np.random.default_rng(0).integers(0, len(documents), 20_000).tolist()
took = []
for again in range(2):
    began = time.perf_counter()
    for i in numbers:
        documents[i]
    took.append((time.perf_counter() - began) / len(numbers))
held = memory() - before
began = time.perf_counter()
documents.check()
print(json.dumps([opened, *took, held, time.perf_counter() - began]))
"""


def generate(prefix: Path, documents: int) -> None:
    """An index as it would be written, and a .bin of holes."""
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, documents, documents + 1))
        for start, step, dtype in ((TOKENS, 0, "<i4"), (0, 2 * TOKENS, "<i8"), (0, 1, "<i8")):
            for at in range(0, documents, PIECE):
                file.write((start + step * np.arange(at, min(at + PIECE, documents))).astype(dtype).data)
        file.write(struct.pack("<q", documents))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(2 * TOKENS * documents)


def measure(documents: int) -> str:
    """Open one of so many documents, and read some of them."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "x")
        generate(prefix, documents)
        index = prefix.with_suffix(".idx").stat().st_size
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(prefix)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        opened, first, again, memory, checked = json.loads(done.stdout)
    return (
        f"| {documents / 1e6:.0f} | {documents * TOKENS / 1e9:.1f} | {index / 1e9:.2f} | {1e3 * opened:.1f} | "
        f"{1e6 * first:.1f} | {1e6 * again:.1f} | {memory:.1f} | {checked:.1f} |"
    )


def written() -> list[str]:
    """Speeds of writing and joining, a row each, in MB of .bin a second of CPU time."""
    rng, count = np.random.default_rng(0), 200_000
    arrays = [rng.integers(0, 65536, TOKENS).astype(np.uint16) for _ in range(1000)]
    lists, masks = [x.tolist() for x in arrays], [rng.random(TOKENS) < 0.5 for _ in arrays]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, tokens, learned in (
            ("arrays", arrays, None),
            ("arrays, masks", arrays, masks),
            ("lists", lists, None),
        ):
            writer, began = Writer(Path(folder, name)), time.process_time()
            for i in range(count):
                writer.add(tokens[i % 1000], learned and learned[i % 1000])
            writer.close()
            rows.append((f"write {name}", time.process_time() - began))
        for name, keep in (("join", None), ("join, a document in 50 left out", [rng.random(count) < 0.98])):
            began = time.process_time()
            concatenate(Path(folder, "joined"), [Path(folder, "arrays, masks")], keep)
            rows.append((name, time.process_time() - began))
    return [f"| {name} | {2e-6 * TOKENS * count / spent:.0f} |" for name, spent in rows]


def main() -> None:
    print(f"{describe()}\n")
    print(f"| documents of {TOKENS} tokens | MB/s of CPU time |")
    print("| --- | ---: |")
    print("\n".join(written()), flush=True)
    print(
        "\n| documents, M | tokens, G | index, GB | open, ms | a random document, us | again, us | memory, MB | check, s |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for documents in map(int, sys.argv[1:] or ["1000000", "10000000", "100000000"]):
        print(measure(documents), flush=True)


if __name__ == "__main__":
    main()
