"""prepare: the source becomes token files, a held-out part kept apart."""

import functools
import importlib.util
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

from rwkv_core import processes
from rwkv_core.config import DataConfig
from rwkv_core.data.binidx import SIDES
from rwkv_core.data.prepare import prepare as prepare_data
from rwkv_core.data.prepare import ready
from rwkv_core.errors import WorldError
from tasks import stage
from tasks.params import load
from tasks.record import main_root

WORK = Path(".rwkvflow/prepare")
"""Where finished shards lie until all are, in the main checkout."""


def prepare() -> None:
    """data.source -> outputs/data: token files with masks and weights, what was refused, lints, manifest.json, metrics.json."""
    data = load().data
    work = main_root(Path.cwd()) / WORK
    alone = data.cluster is None and _processes(data) == 1
    manifest = prepare_data(data, stage.DATA, work, None if alone else functools.partial(_pool, data), _Progress())
    source, holdout = manifest["source"], manifest["holdout"]
    told = [
        f"{manifest[side]['documents']} documents of {manifest[side]['tokens']} tokens in {side}, "
        f"{manifest[side]['learned']} of them learned"
        for side in SIDES
    ]
    print(
        f"prepared {source['rows']} rows of {source['files']} files: {'; '.join(told)}; {source['dropped_empty']} empty rows "
        f"dropped, {source['refused']} refused, {holdout['leaks']} leaking into the held-out ones, {holdout['leaks_dropped']} "
        "of them dropped"
    )
    for code, count in manifest["lints"].items():
        print(f"lint {code}: {count}, see {stage.DATA / 'lints.csv'}")
    for name in source["files_not_read"][:10]:
        print(f"not read: {name}, which no pattern of data.parts matches")


def _processes(data: DataConfig) -> int:
    return data.processes or processes.cores()


@contextmanager
def _pool(data: DataConfig, shards: int) -> Iterator[Executor]:
    """What runs so many shards: the cluster's workers, or processes of this machine."""
    if data.cluster is None:
        loaded = functools.partial(ready, data.tokenizer, data.special_tokens)
        with processes.pool(min(_processes(data), shards), loaded) as executor:
            yield executor
        return
    if importlib.util.find_spec("distributed") is None:
        raise WorldError(
            f"data.cluster = {data.cluster}",
            "the package that speaks to it is missing",
            "pip install 'rwkv-flow[dask]'",
        )
    from distributed import Client

    try:
        client = Client(data.cluster, timeout=10)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise WorldError(
            f"data.cluster = {data.cluster}", f"no Dask scheduler answers ({error})", "start it, or correct the address"
        ) from None
    with client, client.get_executor(pure=False, retries=2) as executor:  # type: ignore[no-untyped-call]
        yield executor


class _Progress:
    """A line now and then."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self) -> None:
        self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._shown > self.SECONDS_BETWEEN_LINES:
            print(f"preparing: {done} of {total} shards", flush=True)
            self._shown = time.monotonic()


if __name__ == "__main__":
    stage.main(prepare)
