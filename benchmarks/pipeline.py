"""What orchestration costs: `dvc repro` with nothing to do, and each stage beyond its own work.

python -m benchmarks.pipeline

A copy of the project with tiny inputs is run (tests/project.py), so that a stage is little but its overhead. Its own work is
what the stage's function takes when it is called a second time in one process: everything is imported then, and open. The
libraries are those that this work is done with; the rest is overhead: DVC, Python, params.yaml, MLflow.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import describe

REPEATS = 5
LIBRARIES = {
    "prepare": "numpy, pyrwkv_tokenizer",
    "train": "torch, pytorch_lightning",
    "merge": "torch",
    "evaluate": "torch, jinja2",
    "export": "torch, safetensors, jinja2",
}


def median(measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(REPEATS))


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from project import make

    with tempfile.TemporaryDirectory() as folder:
        project = make(Path(folder))
        project.dvc("repro")

        def whole(*arguments: str) -> float:
            began = time.perf_counter()
            project.dvc("repro", *arguments)
            return time.perf_counter() - began

        def python(code: str) -> float:
            began = time.perf_counter()
            project.run(sys.executable, "-c", code)
            return time.perf_counter() - began

        def own(stage: str) -> float:
            code = f"""
import time
from tasks.{stage} import {stage}
{stage}()
began = time.perf_counter()
{stage}()
print(time.perf_counter() - began)
"""
            return float(project.run(sys.executable, "-c", code).stdout.split()[-1])

        print(f"{describe()}; medians of {REPEATS}\n")
        print(f"`dvc repro` with nothing to do: {median(whole):.2f} s\n")
        print(
            "| stage | `dvc repro --single-item --force`, s | its own work, s | importing its libraries, s | overhead, s |"
        )
        print("| --- | ---: | ---: | ---: | ---: |")
        for stage, libraries in LIBRARIES.items():
            total = median(lambda stage=stage: whole("--single-item", "--force", stage))
            work = median(lambda stage=stage: own(stage))
            imported = median(lambda libraries=libraries: python(f"import {libraries}")) - median(
                lambda: python("pass")
            )
            print(
                f"| {stage} | {total:.2f} | {work:.2f} | {imported:.2f} | {total - work - imported:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
