"""How many arms a sweep gets through: of one second each, which takes no more than the mechanism does.

`python -m benchmarks.sweep --arms 50 --slots 50` prints arms a minute, how many trained at once, and failures.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe, parser


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--arms", type=int, default=50)
    options.add_argument("--slots", type=int, default=50)
    given = options.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from arms import quick

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "project"
        project = quick(root, takes=1)
        rates = ", ".join(f"{number / 10000:g}" for number in range(1, given.arms + 1))
        (root / "sweep.yaml").write_text(
            f"name: many\nfixed: {{adapter.rank: 2, train.optimizer.lr_final: 0}}\ngrid: {{train.optimizer.lr: [{rates}]}}\n"
            f"slots: {given.slots}\n"
        )
        print(describe(), f"load {os.getloadavg()[0]:.1f} before", sep="\n", flush=True)
        began = time.perf_counter()
        command = [sys.executable, "-m", "flows.cli", "sweep", "sweep.yaml"]
        done = subprocess.run(command, cwd=root, env=project.environment, stdout=subprocess.PIPE, text=True)
        took = time.perf_counter() - began
        listed = subprocess.run(
            ["git", "for-each-ref", "refs/exps"], cwd=root, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.splitlines()
        together = [int(line) for line in (root / "together").read_text().split()]
    print(f"load {os.getloadavg()[0]:.1f} after")
    print(
        f"{given.arms} arms of 1 s, {given.slots} slots: {took:.0f} s in all, {60 * given.arms / took:.1f} arms a minute"
    )
    print(f"{done.stdout.count('failed:')} failed, {len(listed)} experiments; exit code {done.returncode}")
    print(f"training at once: median {statistics.median(together):g}, most {max(together)}")


if __name__ == "__main__":
    main()
