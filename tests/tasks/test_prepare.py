"""The prepare stage on a cluster. What it prepares is tested in tests/rwkv_core/data, what it says in test_stages.py."""

import pytest
import servers
from project import make


@pytest.mark.slow
def test_a_cluster_prepares_the_same_bytes(tmp_path):
    from distributed import Client

    project = make(tmp_path / "project")
    rows = project.root / "mine/corpus.jsonl"
    source = project.root / "mine/source"
    source.mkdir()
    for i in range(6):  # a shard each
        (source / f"{i}.jsonl").write_bytes(rows.read_bytes().replace(b"What", b"Who %d" % i))
    project.set(data__source="mine/source")
    project.stage("prepare")
    outputs = project.root / "outputs/data"
    alone = {file.name: file.read_bytes() for file in outputs.iterdir()}
    with servers.dask(project.root, workers=2) as address, Client(address, timeout=servers.PATIENCE) as client:
        client.wait_for_workers(2, timeout=servers.PATIENCE)
        project.set(data__cluster=address)
        said = project.stage("prepare", PYTHONPATH=str(project.root)).stdout
        counts = client.run(lambda dask_worker: dask_worker.state.executed_count)
    assert "prepared 360 rows of 6 files" in said
    assert sum(counts.values()) >= 6
    assert min(counts.values()) > 0  # both took part
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
