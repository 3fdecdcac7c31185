"""jsonl -> binidx with masks: speed and memory of the whole prepare stage on conversations, beside json2binidx's way.

python -m benchmarks.prepare [--processes N ...] [--language english|chinese ...] [--out FILE] [MEGABYTES ...]

English is Python's own documentation; Chinese has words of World's vocabulary in random order, for there is no text of it here.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def measure(source: Path, size: int, language: str, processes: int, near: float | None) -> str:
    """Run the stage as DVC would, in a folder of its own, and say what it took."""
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
        peaks: dict[int, int] = {}
        while not (reaped := os.wait4(child.pid, os.WNOHANG))[0]:
            for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
                try:
                    peaks[process.pid] = max(peaks.get(process.pid, 0), high_water(process.pid))
                except (FileNotFoundError, ProcessLookupError):
                    continue
            time.sleep(0.05)
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(reaped[1])
        if child.returncode:
            raise RuntimeError(f"prepare exited with {child.returncode}")
        usage = reaped[2]
    cpu = usage.ru_utime + usage.ru_stime
    return (
        f"| {language} | {size / 1e6:.0f} | {processes} | {'no' if near is None else 'yes'} | {wall:.1f} "
        f"| {size / 1e6 / wall:.1f} | {size / 1e6 / cpu:.1f} | {peaks[child.pid] / 1e6:.0f} | {sum(peaks.values()) / 1e6:.0f} |"
    )


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
    options.add_argument("--near", action="store_true", help="also with near copies looked for")
    options.add_argument("--folder", type=Path, help="for temporary files; the system's, if none")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    lines = [
        f"Conversations of {ROW} bytes and more, masks are qa. Near copies: whether they are looked for. Peak memory: that of "
        "the stage's own process, then of all.",
        "",
        "| text | MB | processes | near copies | wall, s | MB/s | MB/s of CPU time | peak, MB | all processes' peaks, MB |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for language in given.language:
        for megabytes in given.megabytes:
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                source = Path(folder, "source.jsonl")
                size = generate(source, language, megabytes)
                for near, processes in itertools.product((None, 0.8) if given.near else (None,), given.processes):
                    lines.append(measure(source, size, language, processes, near))
                    print(lines[-1], flush=True)
                lines.append(
                    f"| {language}, json2binidx's way | {PYTHON_MB} | 1 | no | | {pure_python(source):.2f} | | | |"
                )
                print(lines[-1], flush=True)
    tell(f"{describe()}\n\n" + "\n".join(lines) + "\n", given.out)


if __name__ == "__main__":
    main()
