"""Numbers that were stored once, to which a run must come again."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent / "golden"


def check(name: str, found: dict[str, list[float]], config: pytest.Config) -> None:
    """Compare with tests/golden/NAME.json: to the last bit on a processor that it has numbers of, else to four digits.

    Matrix products sum in an order that depends on the processor and on torch's version. A change that is meant to have no
    numerical effect leaves the file as it is; `pytest --update-golden` writes the numbers of the processor at hand anew.
    """
    path = FOLDER / f"{name}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if config.getoption("--update-golden"):
        stored[_made_by()] = found
        path.write_text(json.dumps(stored, indent=1) + "\n")
    exact = stored.get(_made_by())
    other = next(iter(stored.values()))
    assert found.keys() == other.keys()
    for part, values in found.items():
        assert values == pytest.approx(other[part], rel=1e-4), part
        if exact is not None:
            assert values == exact[part], part


def _made_by() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    processor = names[0] if names else platform.processor()
    return f"torch {torch.__version__}, {processor}, {torch.backends.cpu.get_cpu_capability()}"
