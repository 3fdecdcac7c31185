"""What all tests share: tests that need a GPU leave the collection where there is none; a small model, a small corpus.

torch is imported where it is used, so that the tests of flows and tasks start without it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "TRITON_INTERPRET" not in os.environ and not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
    # read when triton is imported: where there is no GPU, its kernels run on the CPU
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Stored numbers are written anew on request alone."""
    parser.addoption("--update-golden", action="store_true", help="store the numbers of tests/golden anew")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `gpu` tests where there is no GPU: a skip would have to be read each time, and says nothing new."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def what_was_compiled_is_forgotten() -> Iterator[None]:
    """Torch.compile counts the kinds of inputs that a function has met, in all tests, and gives up at the ninth."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture
def random_model() -> Callable[..., Any]:
    """Makes a small model of any version, every parameter random."""
    from random_models import make

    return make


@pytest.fixture
def tiny(random_model: Callable[..., Any]) -> Any:
    """A small RWKV-7 of 64 tokens."""
    return random_model()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small jsonl of questions and answers, four rows to a group."""
    path = tmp_path / "corpus.jsonl"
    rows = [
        {
            "text": f"User: How much is {i} and {i + 1}?\n\nAssistant: It is {2 * i + 1}." + " Really 真的." * (i % 5),
            "topic": f"topic {i // 4}",
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
