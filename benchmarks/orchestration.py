"""What Prefect and MLflow cost: a pipeline with nothing to do, each stage that runs, metrics of each step.

python -m benchmarks.orchestration [--rounds 3]

A copy of the project with tiny inputs (tests/project.py), a real Prefect server, a real MLflow server. Beside wall time stands
the processors' time of the command and all that it starts, which others on the machine stretch less.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

STEPS, STEP, METRICS = 200, 0.1, 10


@contextmanager
def server(command: list[str], url: str, environment: dict[str, str], folder: Path) -> Iterator[None]:
    from tasks.stage import answers

    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, stdout=log, stderr=log, cwd=folder
        )
    try:
        while not answers(url):
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


def spent(run: Any, rounds: int) -> tuple[float, float]:
    """Seconds on the wall, and of processors; medians."""
    found = []
    for _ in range(rounds):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append((time.perf_counter() - began, processors))
    return statistics.median(wall for wall, _ in found), statistics.median(processors for _, processors in found)


def logging_share(folder: Path, uri: str) -> tuple[float, float]:
    """Of a step: what the training waits for its metrics to be logged, and what other threads compute meanwhile."""
    from tasks import tracking
    from tasks.params import load
    from tasks.record import RunRecord

    os.environ["MLFLOW_TRACKING_URI"] = uri
    run = folder / tracking.RUNS / "0123456789abcdef"
    run.mkdir(parents=True)
    record = RunRecord.fresh(folder, digest=run.name, started=time.time(), params={}, base={}, data={})
    record.write(run)
    with tracking.Live(run, load(folder / "params.yaml").tracking) as live:
        time.sleep(15)  # MLflow is imported, which happens once a run
        waited, whole, own = 0.0, time.process_time(), time.thread_time()
        for step in range(1, STEPS + 1):
            end = time.thread_time() + STEP
            while time.thread_time() < end:
                sum(range(1000))
            began = time.thread_time()
            live.log(step, {f"train/metric_{i}": float(step * i) for i in range(METRICS)})
            waited += time.thread_time() - began
        others = (time.process_time() - whole) - (time.thread_time() - own)
        assert threading.active_count() > 2
    return waited / (STEPS * STEP), others / (STEPS * STEP)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    rounds = options.parse_args().rounds
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from miniature import free_port
    from project import make

    from flows.environment import defaults

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project = make(folder)
        stages = 6
        prefect, mlflow = free_port(), free_port()
        api, uri = f"http://127.0.0.1:{prefect}/api", f"http://127.0.0.1:{mlflow}"
        environment = project.environment | defaults(folder)
        Path(environment["PREFECT_HOME"]).mkdir(parents=True)
        clients = {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": uri, **defaults(folder)}

        def flow(*words: str) -> None:
            project.run(sys.executable, "-m", "flows.cli", "run", *words, **clients)

        def bare(*words: str) -> None:
            project.run(sys.executable, "-m", "dvc", "repro", *words, **clients)

        serve = [
            "mlflow",
            "server",
            "--port",
            str(mlflow),
            "--workers",
            "1",
            "--backend-store-uri",
            "sqlite:///mlflow.db",
        ]
        with (
            server(["prefect", "server", "start", "--no-ui", "--port", str(prefect)], api, environment, folder),
            server(serve, uri, environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, folder),
        ):
            flow()
            print(f"{describe()}; load {os.getloadavg()[0]:.0f}; medians of {rounds}\n")
            print("| | wall, s | processors, s |\n| --- | ---: | ---: |")

            def row(name: str, run: Any) -> tuple[float, float]:
                wall, processors = spent(run, rounds)
                print(f"| {name} | {wall:.1f} | {processors:.1f} |", flush=True)
                return wall, processors

            row("`dvc repro`, nothing to do", bare)
            row("`rwkvflow run`, nothing to do", flow)
            plain = row(f"`dvc repro --force`, {stages} stages", lambda: bare("--force"))
            shown = row(f"`rwkvflow run --force`, {stages} stages", lambda: flow("--force"))
            both = [(b - a) / stages for a, b in zip(plain, shown, strict=True)]
            print(f"| what Prefect adds to a stage that runs | {both[0]:.1f} | {both[1]:.1f} |")
            print(f"\nload {os.getloadavg()[0]:.0f}", flush=True)
            waited, others = logging_share(folder, uri)
            print(
                f"\n{METRICS} metrics a step of {STEP * 1e3:.0f} ms: the training spends {waited:.3%} of its time in logging, "
                f"threads beside it {others:.2%} of a processor's (sending to MLflow, the machine's own metrics)."
            )


if __name__ == "__main__":
    main()
