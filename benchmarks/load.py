"""Loading a 1.5B RWKV-7 from every form: time, and memory by the size of the file or of the model, whichever is larger.

python -m benchmarks.load [FOLDER]      FOLDER, the system's for temporary files by default, needs 7 GB

Each load is a process of its own. Memory is the largest that was resident, less what it was once torch was there: pages of a
mapped file count as long as they are in memory. "then read" is after every value of the model has been read once.
"""

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from benchmarks.machine import describe
from rwkv_core.formats import huggingface, web_rwkv
from rwkv_core.models.rwkv7 import RWKV7, Shape7

ROOT = Path(__file__).parent.parent
SHAPE = Shape7("7", 24, 2048, 2048, 8192, 64, 65536, 8.0, 96, 96, 64, 256, value_residual_in_layer_0=False)
PARTS = 4

CHILD = """
import json, sys, time
from pathlib import Path
from benchmarks.prepare import high_water
from rwkv_core import models
import torch
torch.set_num_threads(1)
before = high_water("self")
began = time.perf_counter()
model = models.load(Path(sys.argv[1]), dtype={"float32": torch.float32}.get(sys.argv[2]))
wall, loaded = time.perf_counter() - began, high_water("self") - before
for x in model.parameters():
    x.max()
size = sum(x.numel() * x.element_size() for x in model.parameters())
print(json.dumps({"wall": wall, "loaded": loaded, "read": high_water("self") - before, "size": size}))
"""


def tensors() -> dict[str, Tensor]:
    """Random numbers, in the shapes of the official 1.5B."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in RWKV7(SHAPE).state_dict().items()}
    return {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def write_pth(folder: Path) -> Path:
    torch.save(tensors(), folder / "model.pth")
    return folder / "model.pth"


def write_safetensors(folder: Path) -> Path:
    safetensors.torch.save_file(tensors(), folder / "model.safetensors")
    return folder / "model.safetensors"


def write_st(folder: Path) -> Path:
    web_rwkv.write(folder / "model.st", tensors())
    return folder / "model.st"


def write_huggingface(folder: Path) -> Path:
    converted = huggingface.from_official(tensors())
    names, where = list(converted), {}
    for i in range(PARTS):
        file = f"model-{i + 1:05}-of-{PARTS:05}.safetensors"
        safetensors.torch.save_file({name: converted[name] for name in names[i::PARTS]}, folder / file)
        where |= dict.fromkeys(names[i::PARTS], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    return folder


FORMS: dict[str, Callable[[Path], Path]] = {
    ".pth": write_pth,
    ".safetensors": write_safetensors,
    ".st": write_st,
    f"Hugging Face, {PARTS} parts": write_huggingface,
}


def measure(form: str, path: Path, dtype: str) -> str:
    """Load in a process of its own, and say what it took."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), dtype], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    took = json.loads(done.stdout)
    files = [path] if path.is_file() else list(path.iterdir())
    size = sum(file.stat().st_size for file in files)
    larger = max(size, took["size"])
    return (
        f"| {form} | {dtype} | {size / 1e9:.2f} | {took['size'] / 1e9:.2f} | {took['wall']:.1f} | "
        f"{took['loaded'] / larger:.2f} | {took['read'] / larger:.2f} |"
    )


def main() -> None:
    print(f"{describe()}\n")
    print("| form | dtype | file, GB | model, GB | wall, s | peak memory while loading, of the larger | then read |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for form, write in FORMS.items():
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
            path = write(Path(folder))
            gc.collect()
            for dtype in ("as loaded", "float32"):
                print(measure(form, path, dtype), flush=True)


if __name__ == "__main__":
    main()
