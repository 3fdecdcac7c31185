"""The prepare stage on a cluster. What it prepares is tested in tests/rwkv_core/data, what it says in test_stages.py."""

import contextlib
import os
import re
import subprocess
import sys

import pytest
from project import make


@contextlib.contextmanager
def dask(folder):
    """A Dask scheduler and a worker, as separate programs; the scheduler's address."""
    environment = os.environ | {"DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    scheduler = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "distributed.cli.dask_scheduler",
            "--port",
            "0",
            "--no-dashboard",
            "--host",
            "127.0.0.1",
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    )
    with scheduler:
        try:
            address = next(found[0] for line in scheduler.stderr if (found := re.search(r"tcp://[\d.]+:\d+", line)))
            worker = subprocess.Popen(
                [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"],
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=environment,
            )
            with worker:
                try:
                    yield address
                finally:
                    worker.terminate()
        finally:
            scheduler.terminate()
            scheduler.stderr.close()


@pytest.mark.slow
def test_a_cluster_prepares_the_same_bytes(tmp_path):
    project = make(tmp_path / "project")
    rows = project.root / "mine/corpus.jsonl"
    source = project.root / "mine/source"
    source.mkdir()
    for i in range(3):  # a shard each
        (source / f"{i}.jsonl").write_bytes(rows.read_bytes().replace(b"What", b"Who %d" % i))
    project.set(data__source="mine/source")
    project.stage("prepare")
    outputs = project.root / "outputs/data"
    alone = {file.name: file.read_bytes() for file in outputs.iterdir()}
    with dask(project.root) as address:
        project.set(data__cluster=address)
        said = project.stage("prepare", PYTHONPATH=str(project.root)).stdout
    assert "prepared 180 rows of 3 files" in said
    assert {file.name: file.read_bytes() for file in outputs.iterdir()} == alone


@pytest.mark.slow
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense"])
def test_a_cluster_that_is_not_there_is_explained(address, tmp_path):
    project = make(tmp_path / "project")
    source = project.root / "mine/source"
    source.mkdir()
    for i in range(2):
        (source / f"{i}.jsonl").write_bytes((project.root / "mine/corpus.jsonl").read_bytes())
    project.set(data__source="mine/source", data__cluster=address)
    failed = project.stage("prepare", check=False)
    assert failed.returncode == 1
    assert f"data.cluster = {address}: no Dask scheduler answers" in failed.stdout
    assert "Traceback" not in failed.stdout
