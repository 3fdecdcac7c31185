"""A pipeline whose programs are killed comes to the same end; `python -m benchmarks.faults` kills more of them."""

from pathlib import Path

import pytest
from faults import fault, operated


@pytest.mark.slow
def test_it_comes_to_the_same_end(settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    root = tmp_path / "repository"
    root.mkdir()
    with operated(root) as (here, wanted):
        for target, delay in (("Prefect server", 3.0), ("flow run", 5.0), ("train", 4.0), ("everything", 5.0)):
            print(fault(here, wanted, target, delay))
