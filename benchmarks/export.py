"""Export of a 1.5B RWKV-7 to each format: speed beside a plain copy of the disk, and memory beyond the largest tensor.

python -m benchmarks.export [FOLDER] [FORMAT ...]    FOLDER, the system's for temporary files by default, needs 12 GB

Each export is a process of its own: it writes the files, reads each back and compares it value by value, and takes the digests
of what went in and came out. "whole" is all of that. "written" is the writing alone, with the check of the values that every
format has before it. MB/s are bytes of the model (source) or of the files (output) a second of it. A copy is synced.
Memory is the largest that was resident, less what it was once the code was there, less the largest tensor as the model has it:
pages of a mapped file count as long as they are in memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.load import SHAPE
from benchmarks.machine import describe
from rwkv_core import checkpoint
from rwkv_core.models.rwkv7 import RWKV7

ROOT = Path(__file__).parent.parent

FORMATS = {
    "pth": {"formats": ["pth"]},
    "pth, fp32": {"formats": ["pth"], "dtype": "fp32"},
    "st": {"formats": ["st"]},
    "gguf, f32": {"formats": ["gguf"], "gguf": ["f32"]},
    "gguf, f16": {"formats": ["gguf"], "gguf": ["f16"]},
    "gguf, bf16": {"formats": ["gguf"], "gguf": ["bf16"]},
    "gguf, q8_0": {"formats": ["gguf"], "gguf": ["q8_0"]},
    "hf": {"formats": ["hf"]},
}
USUAL = {
    "dtype": "as_loaded",
    "gguf": ["f16"],
    "hf": {"dtype": "as_loaded", "part_gb": 5},
}

CHILD = """
import json, sys, time
from pathlib import Path
from benchmarks.prepare import high_water
from rwkv_core import export
from rwkv_core.config import FormatsConfig
from rwkv_core.tokenizer import world
import gguf, safetensors.torch
world()
spent = []
own = export._check
def check(*given):
    began = time.perf_counter()
    found = own(*given)
    spent.append(time.perf_counter() - began)
    return found
digest = export.sha256
def sha256(path):
    began = time.perf_counter()
    found = digest(path)
    spent.append(time.perf_counter() - began)
    return found
export._check, export.sha256 = check, sha256
before = high_water("self")
began = time.perf_counter()
report = export.export(Path(sys.argv[1]), Path(sys.argv[2]), FormatsConfig.model_validate_json(sys.argv[3]))
whole = time.perf_counter() - began
(entry,) = report["formats"].values()
took = {"whole": whole, "written": whole - sum(spent), "bytes": entry["bytes"], "memory": high_water("self") - before}
print(json.dumps(took))
"""


def make(path: Path) -> int:
    """A checkpoint of random bfloat16, a tensor at a time; bytes of its largest tensor."""
    with torch.device("meta"):
        about = {name: (x.shape, torch.bfloat16) for name, x in RWKV7(SHAPE).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator, dtype=dtype) for shape, dtype in about.values())
    checkpoint.write_each(path, about, drawn)
    return max(shape.numel() * dtype.itemsize for shape, dtype in about.values())


def copy(model: Path, folder: Path) -> float:
    """Bytes a second of a copy, from one place of the disk to another."""
    began = time.perf_counter()
    subprocess.run(
        ["dd", f"if={model}", f"of={folder / 'copy'}", "bs=4M", "conv=fsync"], check=True, stderr=subprocess.DEVNULL
    )
    took = time.perf_counter() - began
    (folder / "copy").unlink()
    return model.stat().st_size / took


def measure(form: str, model: Path, folder: Path, largest: int) -> str:
    """Export in a process of its own, beside a copy, and say what it took."""
    settings = json.dumps(USUAL | FORMATS[form])
    plain = copy(model, folder)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(model), out, settings],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    took = json.loads(done.stdout)
    source = model.stat().st_size
    rates = [size / 1e6 / took[part] for part in ("whole", "written") for size in (source, took["bytes"])]
    return (
        f"| {form} | {took['bytes'] / 1e9:.2f} | {took['whole']:.1f} | {rates[0]:.0f} | {rates[1]:.0f} | {took['written']:.1f} "
        f"| {rates[2]:.0f} | {rates[3]:.0f} | {plain / 1e6:.0f} | {rates[3] * 1e6 / plain:.2f} "
        f"| {(took['memory'] - largest) / 1e6:.0f} |"
    )


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as made:
        folder = Path(made)
        largest = make(folder / "model.pth")
        print(f"{describe()}; a model of {(folder / 'model.pth').stat().st_size / 1e9:.2f} GB\n")
        print(
            "| format | output, GB | whole, s | source MB/s | output MB/s | written, s | source MB/s | output MB/s "
            "| copy MB/s | written / copy | memory beyond, MB |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for form in sys.argv[2:] or FORMATS:
            print(measure(form, folder / "model.pth", folder, largest), flush=True)


if __name__ == "__main__":
    main()
