"""Kills at random instants: Prefect's server, MLflow's, the runner, a flow run, dvc, the training, everything at once.

python -m benchmarks.faults [--kills 20] [--seed 1]

After each the pipeline must come to the same dvc.lock and the same model, with no process, no lock, no slot and no run left
that is shown as running. It stops at the first that does not. A miniature repository is served by `rwkvflow up`.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from faults import end_with, fault, operated, plan

    from flows.environment import defaults

    end_with(signal.SIGTERM)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        root.mkdir()
        os.environ.update(defaults(root))
        with operated(root) as (here, wanted):
            for number, (target, delay) in enumerate(plan(given.kills, given.seed), 1):
                print(f"{number}. {fault(here, wanted, target, delay)}", flush=True)


if __name__ == "__main__":
    main()
