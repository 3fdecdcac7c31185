"""A pipeline whose programs are killed comes to the same end; `python -m benchmarks.faults` kills more of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults import ROOT, Operated, fault, left, operated


@pytest.mark.slow
def test_it_comes_to_the_same_end(settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    root = tmp_path / "repository"
    root.mkdir()
    with operated(root) as (here, wanted):
        for target, delay in (("Prefect server", 3.0), ("flow run", 5.0), ("train", 4.0), ("everything", 5.0)):
            print(fault(here, wanted, target, delay))
        suspend_and_resume(here, wanted)
        two_at_once(here, wanted)


def suspend_and_resume(here: Operated, wanted: dict[str, bytes]) -> None:
    """The button in the UI: what trains saves and stops, its slot is free; and goes on from there."""
    here.fresh()
    run = here.ask()
    checkpoint = here.root / ".rwkvflow/checkpoint"
    here.wait(checkpoint.exists)
    suspended = {"type": "PAUSED", "name": "Suspended", "state_details": {"pause_reschedule": True}}
    here.call(f"/flow_runs/{run}/set_state", {"state": suspended})
    here.wait(lambda: not here.processes("flow run") and not here.processes("train"))
    assert here.state(run) == "PAUSED"
    saved = int(checkpoint.read_text().split()[0])
    assert 0 < saved < 40
    here.wait(lambda: not any((here.slots() or {"away": 1}).values()))
    said = here.root / ".rwkvflow/logs/train.log"
    before = said.stat().st_size
    here.call(f"/flow_runs/{run}/resume", {})
    assert here.ended(run) == "COMPLETED"
    assert left(here.root) == wanted
    assert f"step {saved + 1}/40" in said.read_text()[before:]
    assert "step 1/40" not in said.read_text()[before:]


def two_at_once(here: Operated, wanted: dict[str, bytes]) -> None:
    """Two flow runs and two `dvc repro` on one checkout: each stage runs once, the others wait and say so."""
    here.fresh()
    first = here.ask()
    here.wait(lambda: here.processes("train"))
    training = here.processes("train")
    for process in training:  # until the second is there, which takes longer than this training
        process.suspend()
    second = here.ask()
    here.wait(lambda: any("waiting for a GPU slot" in line for line in here.logs(second)))
    for process in training:
        process.resume()
    bare = [
        subprocess.Popen(
            [sys.executable, "-m", "dvc", "--wait-for-lock", "repro"],
            cwd=here.root, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert here.ended(first) == "COMPLETED"
    assert here.ended(second) == "COMPLETED"
    for process in bare:
        process.wait(300)  # DVC's own answer to a busy file is to fail; it must not do harm
    assert left(here.root) == wanted
    assert here.ended(here.ask()) == "COMPLETED"
