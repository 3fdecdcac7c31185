"""jsonl -> binidx: speed and memory of the whole prepare stage, on generated English of any size.

python -m benchmarks.prepare [MEGABYTES ...]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe
from demo.corpus import entries

ROOT = Path(__file__).parent.parent


def generate(path: Path, megabytes: int) -> int:
    """Rows of real English, repeated with a number in front so that no two are equal; returns the text's bytes."""
    texts = [entry.text for entry in entries()]
    done = row = 0
    with path.open("w", encoding="utf-8") as file:
        while done < megabytes * 1_000_000:
            text = f"User: {row}\n\nAssistant: {texts[row % len(texts)]}"
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            done, row = done + len(text.encode()), row + 1
    return done


def high_water(pid: int) -> int:
    """Largest resident memory so far, in bytes. ru_maxrss would count this process's own, from before the exec."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def measure(megabytes: int) -> str:
    """Run the stage as DVC would, in a folder of its own, and say what it took."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source.jsonl")
        size = generate(source, megabytes)
        params = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("demo/outputs/corpus.jsonl", str(source))
        Path(folder, "params.yaml").write_text(params.replace("group: topic", "group: null"), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        began = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "tasks.prepare"], cwd=folder, env=environment, stdout=subprocess.DEVNULL
        )
        peak = 0
        while not (reaped := os.wait4(child.pid, os.WNOHANG))[0]:
            peak = max(peak, high_water(child.pid))
            time.sleep(0.02)
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(reaped[1])
        if child.returncode:
            raise RuntimeError(f"prepare exited with {child.returncode}")
        usage = reaped[2]
    cpu = usage.ru_utime + usage.ru_stime
    return f"| {size / 1e6:.0f} | {wall:.1f} | {size / 1e6 / wall:.1f} | {size / 1e6 / cpu:.1f} | {peak / 1e6:.0f} |"


def main() -> None:
    print(f"{describe()}\n")
    print("| text, MB | wall, s | MB/s | MB/s of CPU time | peak memory, MB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for megabytes in map(int, sys.argv[1:] or ["50", "500", "2000"]):
        print(measure(megabytes), flush=True)


if __name__ == "__main__":
    main()
