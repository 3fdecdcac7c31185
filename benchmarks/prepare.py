"""jsonl -> binidx with masks: speed and memory of the whole prepare stage on conversations, beside json2binidx's way.

python -m benchmarks.prepare [--processes N ...] [--language english|chinese ...] [--near yes|no ...] [--rounds N]
                             [--out FILE] [MEGABYTES ...]

English is Python's own documentation; Chinese has words of World's vocabulary in random order, for there is no text of it here.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from ruamel.yaml import YAML

from benchmarks.machine import describe, tell
from demo.corpus import entries
from rwkv_core.data.binidx import Writer
from rwkv_core.tokenizer import END, greedy_encoder, world

ROOT = Path(__file__).parent.parent
ROW = 2000
"""Bytes from which on a conversation is long enough."""

BETWEEN_LOOKS = 0.5
"""Seconds between two looks at the processes: each takes a moment of theirs."""

PYTHON_MB = 1
"""Of text that the pure Python way is timed on."""


def english() -> Iterator[str]:
    """Answers of lines that stand one below the other somewhere: no two are alike."""
    lines = [line for entry in entries() for line in entry.text.splitlines()]
    draw = random.Random(0)
    while True:
        starts = [draw.randrange(len(lines)) for _ in range(4)]
        yield "\n".join("\n".join(lines[start : start + 3]) for start in starts)


def chinese() -> Iterator[str]:
    """Answers of some 600 characters."""
    words = [text for entry in world().table if (text := entry.decode("utf-8", "ignore")) and _is_chinese(text)]
    draw = random.Random(0)
    while True:
        yield "".join("".join(draw.choices(words, k=8)) + "，。"[i % 2] for i in range(40))


def _is_chinese(text: str) -> bool:
    return all("\u4e00" <= character <= "\u9fff" for character in text)


NEAR = {"no": None, "yes": 0.8}
"""Values of data.holdout.near_duplicates."""

LANGUAGES = {"english": english, "chinese": chinese}


def generate(path: Path, language: str, megabytes: float) -> int:
    """Rows of conversations, numbered so that no two are equal; returns the text's bytes."""
    done = 0
    with path.open("w", encoding="utf-8") as file:
        answers = LANGUAGES[language]()
        for row in itertools.count():
            text = f"User: {row}\n\nAssistant: {next(answers)}"
            while len(text.encode()) < ROW:
                text += f"\n\nUser: and {row}?\n\nAssistant: {next(answers)}"
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            done += len(text.encode())
            if done >= megabytes * 1_000_000:
                return done
    raise AssertionError


def high_water(pid: int | str) -> int:
    """Largest resident memory so far, in bytes. ru_maxrss would count this process's own, from before the exec."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


class Took(NamedTuple):
    """What a run of the stage took."""

    wall: float
    """Seconds, with its start."""
    cpu: float
    """Seconds of all its processes."""
    peak: int
    """Bytes of memory, of the process that had most."""
    together: int
    """Bytes of all processes at once, what they share counted once."""


def measure(source: Path, processes: int, near: float | None) -> Took:
    """Run the stage as DVC would, in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        params: Any = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        params["data"] |= {"source": str(source), "processes": processes}
        params["data"]["parts"][0]["mask"] = "qa"
        params["data"]["holdout"] |= {"group": None, "near_duplicates": near}
        YAML(typ="safe").dump(params, Path(folder, "params.yaml"))
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        began = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "tasks.prepare"], cwd=folder, env=environment, stdout=subprocess.DEVNULL
        )
        peaks, seconds, together = dict[int, int](), dict[int, float](), 0
        while child.poll() is None:
            size = 0
            for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
                try:
                    peaks[process.pid] = max(peaks.get(process.pid, 0), high_water(process.pid))
                    seconds[process.pid] = sum(process.cpu_times()[:2])
                    size += process.memory_full_info().pss
                except (FileNotFoundError, ProcessLookupError, psutil.Error):
                    continue
            together = max(together, size)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(BETWEEN_LOOKS)
        wall = time.perf_counter() - began
        if child.returncode:
            raise RuntimeError(f"prepare exited with {child.returncode}")
    return Took(wall, sum(seconds.values()), max(peaks.values()), together)


def pure_python(source: Path) -> float:
    """MB/s of json2binidx_tool's way: a row at a time, at each byte the longest entry, all in Python."""
    encode, done = greedy_encoder(world().table), 0
    with tempfile.TemporaryDirectory(dir=source.parent) as folder, source.open(encoding="utf-8") as file:
        writer = Writer(Path(folder, "x"), "int32", beside=False)
        began = time.perf_counter()
        for line in file:
            text = json.loads(line)["text"]
            writer.add(np.array([*encode(text), END], np.int32))
            done += len(text.encode())
            if done > PYTHON_MB * 1_000_000:
                break
        writer.close()
        return done / 1e6 / (time.perf_counter() - began)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("megabytes", nargs="*", type=float, default=[200.0])
    options.add_argument("--language", nargs="+", choices=LANGUAGES, default=list(LANGUAGES))
    options.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    options.add_argument("--rounds", type=int, default=1, help="in each, every number of processes in turn")
    options.add_argument("--near", nargs="+", choices=NEAR, default=["yes"], help="whether near copies are looked for")
    options.add_argument("--folder", type=Path, help="for temporary files; the system's, if none")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    lines = [
        f"Conversations of {ROW} bytes and more, masks are qa; the whole stage, with its start. Near copies: whether they are "
        "looked for. Medians of rounds in which the numbers of processes took turns; speedup: the median, and the range, of "
        f"the ratio to {given.processes[0]} of the same round. Peak memory: of the process that had most, then of all at "
        "once, what they share counted once.",
        "",
        "| text | MB | processes | near copies | wall, s | MB/s | MB/s of CPU time | speedup | peak, MB | of all, MB |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for language, megabytes in itertools.product(given.language, given.megabytes):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            source = Path(folder, "source.jsonl")
            size = generate(source, language, megabytes) / 1e6
            for near in given.near:
                rounds = []
                for _ in range(given.rounds):
                    rounds.append([measure(source, processes, NEAR[near]) for processes in given.processes])
                    print(language, *(f"{took.wall:.1f} s" for took in rounds[-1]), file=sys.stderr, flush=True)
                for i, processes in enumerate(given.processes):
                    wall, cpu, peak, together = (statistics.median(turn[i][j] for turn in rounds) for j in range(4))
                    ratios = sorted(turn[0].wall / turn[i].wall for turn in rounds)
                    speedup = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                    lines.append(
                        f"| {language} | {size:.0f} | {processes} | {near} | {wall:.1f} "
                        f"| {size / wall:.1f} | {size / cpu:.1f} | {speedup} | {peak / 1e6:.0f} | {together / 1e6:.0f} |"
                    )
            lines.append(
                f"| {language}, json2binidx's way | {PYTHON_MB} | 1 | no | | {pure_python(source):.2f} | | | | |"
            )
    tell(f"{describe()}\n\n" + "\n".join(lines) + "\n", given.out)


if __name__ == "__main__":
    main()
