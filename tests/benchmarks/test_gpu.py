"""The benchmark of a GPU, rehearsed on the CPU in tiny sizes: a GPU's minutes are too dear to find its faults with."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import gpu

ROOT = Path(__file__).parents[2]

WITHOUT = """
import sys
from importlib.machinery import PathFinder

GONE = {
    "bitsandbytes", "deepspeed", "dvc", "fla", "hypothesis", "matplotlib", "mlflow", "ninja", "playwright", "prefect",
    "peft", "psutil", "pydantic", "pyrwkv_tokenizer", "ruamel", "rwkv", "safetensors", "scipy", "tokenizers", "transformers",
}


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in GONE else super().find_spec(name, path, target)


sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def test_rehearsal(tmp_path):
    table = gpu.measure("cpu", gpu.SMALL, tmp_path)
    told = json.loads(table.with_suffix(".json").read_text())
    assert {row["operator"] for row in told["WKV"]} == {"wkv4", "wkv6", "wkv7"}
    assert {"cpu", "torch"} <= {row["implementation"] for row in told["WKV"]}
    assert all(row["both_ms"] > 0 and row["error"] < 0.02 for row in told["WKV"])
    assert len(told["Around it"]) == 10
    steps = [(row["model"], row["matrices"], row["blocks made again"]) for row in told["LoRA step"]]
    assert steps == [("tiny", form, again) for form in ("none", "int8", "nf4") for again in ("no", "yes")]
    text = table.read_text()
    assert all(f"## {title}" in text for title in ("WKV", "Around it", "LoRA step"))


def test_it_and_its_tests_need_no_more_than_an_image_with_torch(tmp_path):
    """Triton, nvcc and pytest aside: `make gpu-check` sets nothing up."""
    (tmp_path / "without.py").write_text(WITHOUT)
    (arguments,) = re.findall(r"-m pytest (-m gpu .*)", (ROOT / "Makefile").read_text())
    command = [sys.executable, "-m", "pytest", "-p", "without", "-p", "no:hypothesispytest", "--collect-only"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, *arguments.split()], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 5), done.stdout  # 5: without a GPU, all that was found is deselected
    assert int(re.findall(r"(\d+) deselected", done.stdout)[-1]) > 1000
    subprocess.run([sys.executable, "-c", "import without, benchmarks.gpu"], cwd=ROOT, env=env, check=True)
