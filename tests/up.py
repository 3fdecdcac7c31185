"""`rwkvflow up` for tests: really started in the current folder, and stopped."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def started(
    prefect: int, mlflow: int, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process, and the file with what it says."""
    ports = ["--prefect-port", str(prefect), "--mlflow-port", str(mlflow)]
    output = Path("up.txt")
    with output.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "up", *ports, *options],
            stdout=sink,
            stderr=sink,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process, output
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def call(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.load(reply)
