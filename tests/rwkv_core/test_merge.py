"""A merge of every form of base, and what it takes of memory. test_adapters.py shows what it computes, for every method."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from rwkv_core import checkpoint
from rwkv_core.adapters import file
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.config import LoraConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.merge import Part, merge

WIDTH = 1024

MERGE = """
import sys
from pathlib import Path
from rwkv_core.merge import Part, merge

def memory(entry):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(entry))

before = memory("VmRSS")
merge(Path(sys.argv[1]), [Part(Path(x)) for x in sys.argv[3:]], Path(sys.argv[2]))
print(memory("VmHWM") - before)
"""


@pytest.fixture
def large(tmp_path):
    """A base of 0.3 GB, whose every matrix two adapters change."""
    block = torch.randn(4 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    shapes = {name: (WIDTH, WIDTH) for name in ("att.receptance", "att.key", "att.value", "att.output")}
    shapes |= {"ffn.key": (4 * WIDTH, WIDTH), "ffn.value": (WIDTH, 4 * WIDTH)}
    modules = {f"blocks.{i}.{name}": shape for i in range(11) for name, shape in shapes.items()}
    base = tmp_path / "base.pth"
    checkpoint.write(base, {f"{name}.weight": block.view(-1)[: a * b].view(a, b) for name, (a, b) in modules.items()})
    about = LoraConfig(
        kind="lora", rank=4, alpha=4.0, rank_stabilized=False, dropout=0.0, dora=False, targets=("*",), layers="all", also=(),
        state="none", load=None,
    )  # fmt: skip
    record = AdapterRecord(
        format=1, adapter=about, base_sha256=sha256(base), data_sha256="d", vocabulary_sha256="v", run="r"
    )
    adapters = []
    for name in ("one", "other"):
        parts = {f"{module}.lora_A": torch.ones(4, into) for module, (_, into) in modules.items()}
        parts |= {f"{module}.lora_B": torch.ones(out, 4) for module, (out, _) in modules.items()}
        adapters.append(tmp_path / f"{name}.pth")
        file.write(adapters[-1], parts, record)
    return base, adapters


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.slow
def test_a_merge_holds_a_few_tensors_and_not_the_model(count, large, tmp_path):
    """All that is resident counts, the pages of the mapped base too: they are let go of with their tensor."""
    base, adapters = large
    out = tmp_path / "merged.pth"
    code = textwrap.dedent(MERGE)
    words = [sys.executable, "-c", code, base, out, *adapters[:count]]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    widest = 4 * WIDTH * 4 * WIDTH  # bytes of the largest matrix in float32
    assert base.stat().st_size > 16 * widest
    assert int(done.stdout) < 10 * widest
    start, merged = checkpoint.read(base), checkpoint.read(out)
    assert list(merged) == list(start)
    assert all(torch.equal(merged[name], (x.float() + 4 * count).bfloat16()) for name, x in start.items())


def in_parts(tensors, path):
    path.mkdir()
    names = list(tensors)
    where = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(where.values()):
        save_file({name: x for name, x in tensors.items() if where[name] == part}, path / part)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def turned(tensors, path):
    """Each stored with its axes the other way round, and equal ones once."""
    stored = {name: x.T.contiguous().T if x.ndim == 2 else x for name, x in tensors.items()}
    stored["blocks.1.ln1.weight"] = stored["blocks.0.ln1.weight"]
    tensors["blocks.1.ln1.weight"] = tensors["blocks.0.ln1.weight"]
    torch.save(stored, path)


FORMS = {
    "base.pth": lambda tensors, path: checkpoint.write(path, tensors),
    "older.pth": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "turned.pth": turned,
    "base.safetensors": save_file,
    "parts": in_parts,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_whatever_form_the_base_has_the_file_is_that_of_torch_save(form, dtype, tiny, tmp_path):
    tensors = {name: x.to(dtype) for name, x in tiny.state_dict().items()}
    FORMS[form](tensors, tmp_path / form)
    bone = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    norm = torch.full((32,), 0.5, dtype=torch.bfloat16)
    torch.save({"blocks.1.att.key.disha": bone, "blocks.1.ln2.weight": norm}, tmp_path / "bone.pth")
    merge(tmp_path / form, [Part(tmp_path / "bone.pth")], tmp_path / "merged.pth")
    wide = torch.promote_types(dtype, torch.float32)
    key = tensors["blocks.1.att.key.weight"].to(wide) + bone.to(wide).T.repeat(1, 8)
    want = tensors | {"blocks.1.att.key.weight": key.to(dtype), "blocks.1.ln2.weight": norm.to(dtype)}
    with (tmp_path / "want.pth").open("wb") as file_:
        torch.save({name: want[name].contiguous().clone() for name in checkpoint.read(tmp_path / form)}, file_)
    assert (tmp_path / "merged.pth").read_bytes() == (tmp_path / "want.pth").read_bytes()


def test_a_merge_that_fails_midway_leaves_nothing(tiny, tmp_path):
    checkpoint.write(tmp_path / "base.pth", tiny.state_dict())
    bad = {"blocks.0.att.key.disha": torch.ones(4, 32), "blocks.2.att.key.disha": torch.ones(4, 31)}
    torch.save(bad, tmp_path / "bone.pth")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"blocks.2.att.key: does not fit the base: has .*31.*it must be .*32"):
        merge(tmp_path / "base.pth", [Part(tmp_path / "bone.pth")], tmp_path / "merged.pth")
    assert sorted(tmp_path.iterdir()) == before
