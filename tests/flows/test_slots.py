"""GPU slots: a real server's, taken by real flow runs."""

import contextvars
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from miniature import wait_until

from flows import slots
from flows.graph import StoppedError
from flows.life import Life

pytestmark = pytest.mark.usefixtures("repository")


@pytest.fixture
def two(prefect_server: str) -> Iterator[Any]:
    """The server, with slots for two cards, all free."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

    with get_client(sync_client=True) as client:
        for name in ("gpu-0", "gpu-1"):
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
        yield client
        for name in ("gpu-0", "gpu-1"):
            client.delete_global_concurrency_limit_by_name(name)


def taken(client: Any) -> list[str]:
    return sorted(x.name for x in client.read_global_concurrency_limits(limit=20) if x.active_slots)


def life() -> Life:
    return Life(Path.cwd(), str(uuid4()), served=False)


def test_each_takes_one_and_gives_it_back(two: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    stop = threading.Event()
    with slots.slot("train", 1, life(), stop, print) as first:
        with slots.slot("train", 1, life(), stop, print) as second:
            assert taken(two) == ["gpu-0", "gpu-1"]
            assert [v["CUDA_VISIBLE_DEVICES"] for v in (first, second)] == ["GPU-a", "GPU-b"]
        assert taken(two) == ["gpu-0"]
    with slots.slot("train", None, life(), stop, print) as both:
        assert both == {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
        assert taken(two) == ["gpu-0", "gpu-1"]
    assert taken(two) == []


def test_who_finds_none_says_so_and_waits(two: Any):
    said: list[str] = []
    stop, begun = threading.Event(), threading.Event()

    def second() -> None:
        with slots.slot("train", None, life(), stop, said.append):
            begun.set()

    with slots.slot("train", 1, life(), stop, print):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(second,))
        thread.start()
        wait_until(lambda: said)
        assert said == ["train: waiting for a GPU slot; other runs have gpu-0"]
        assert not begun.is_set()
    wait_until(begun.is_set)
    thread.join()
    assert said[1:] == ["train: has gpu-0 and gpu-1 now"]


def test_waiting_can_be_stopped(two: Any):
    stop = threading.Event()

    def ask(line: str) -> None:
        stop.set()

    with (
        slots.slot("train", None, life(), stop, print),
        pytest.raises(StoppedError, match="while it waited"),
        slots.slot("evaluate", 1, life(), stop, ask),
    ):
        pass


def test_a_server_without_slots_holds_nobody_up(prefect_server: str):
    with slots.slot("train", 1, life(), threading.Event(), print) as variables:
        assert variables == {}


def test_a_killed_run_s_slot_and_state_are_given_back(two: Any):
    """Its process is one that really dies: only then does the system unlock its file."""
    import subprocess
    import sys

    from prefect.states import Running

    from flows.pipeline import pipeline
    from flows.reconcile import reconcile

    run = two.create_flow_run(pipeline, state=Running())
    code = f"""
import threading
from pathlib import Path
from flows import slots
from flows.life import Life
life = Life(Path.cwd(), "{run.id}", served=False)
with slots.slot("train", 1, life, threading.Event(), print):
    print("has it", flush=True)
    threading.Event().wait()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    assert reconcile(two, Path.cwd()) == 0  # it lives
    assert taken(two) == ["gpu-0"]
    process.kill()
    process.wait()
    process.stdout.close()
    assert reconcile(two, Path.cwd()) == 1
    assert taken(two) == []
    state = two.read_flow_run(run.id).state
    assert state.is_crashed()
    assert "training continues" in state.message
    assert not (Path(".rwkvflow/flows") / f"{run.id}.json").exists()


def test_what_a_run_could_not_tell_is_told_for_it(prefect_server: str, monkeypatch: pytest.MonkeyPatch):
    from prefect.client.orchestration import get_client
    from prefect.states import Completed, Running

    from flows import reconcile
    from flows.pipeline import pipeline

    monkeypatch.setattr(reconcile, "_SETTLE", -1.0)
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(pipeline, state=Running())
        of = life()
        of.note(state=reconcile.told(Completed(message="3 stages")))
        of.path.with_name(f"{run.id}.json").write_text(of.path.read_text())
        assert reconcile.reconcile(client, Path.cwd()) == 1
        state = client.read_flow_run(run.id).state
    assert state is not None
    assert state.is_completed()
    assert state.message == "3 stages"
