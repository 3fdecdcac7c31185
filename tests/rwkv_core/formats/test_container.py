import json
import os
import struct
import sys
import zipfile

import checkpoints
import psutil
import pytest
import torch
from checkpoints import same

from rwkv_core.errors import InputError
from rwkv_core.formats import container


def refuse(path, match):
    with pytest.raises(InputError, match=match) as caught:
        container.read(path)
    assert all((caught.value.value, caught.value.rule, caught.value.remedy))
    assert str(path) in caught.value.value


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_packed_anew_is_read_or_refused(packing, tmp_path):
    """torch would map the packed bytes as numbers."""
    tensors = checkpoints.official("7")
    path = checkpoints.save_pth(tmp_path, tensors)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pth", "w", packing) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    if packing == zipfile.ZIP_STORED:
        same(container.read(tmp_path / "new.pth"), tensors)
    else:
        refuse(tmp_path / "new.pth", r"data/\d+ is damaged\): the file is cut short or no \.pth; download it again")


@pytest.mark.parametrize("shift", [1, 8, 16, 64, 128])
def test_an_entry_that_begins_elsewhere_is_refused(shift, tmp_path):
    """torch maps a tensor from wherever the entry's own header says: without a check, these would be other numbers."""
    path = checkpoints.save_pth(tmp_path, checkpoints.official("7"))
    with zipfile.ZipFile(path) as archive:
        at = (
            next(e.header_offset for e in archive.infolist() if e.filename.endswith("data/3")) + 28
        )  # extra field's length
    data = bytearray(path.read_bytes())
    data[at : at + 2] = (int.from_bytes(data[at : at + 2], "little") ^ shift).to_bytes(2, "little")
    path.write_bytes(data)
    torch.load(path, mmap=True, weights_only=True)
    refuse(path, "data/3 is damaged")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("x", [torch.zeros(1).expand(3, 4), torch.zeros(9).as_strided((4, 4), (1, 1))])
def test_elements_that_share_memory_are_refused(x, legacy, tmp_path):
    torch.save({"emb.weight": x}, tmp_path / "model.pth", _use_new_zipfile_serialization=not legacy)
    refuse(tmp_path / "model.pth", "emb.weight is no plain array: every value must be stored, once")


def test_turned_and_cut_tensors_are_read(tmp_path):
    x = torch.arange(24.0).view(4, 6)
    tensors = {"turned": x.T, "cut": x[:, 1:3], "row": x[2], "one": x[1, 1], "none": x[:0], "long": x[None, :, None]}
    same(container.read(checkpoints.save_pth(tmp_path, tensors)), tensors)


def test_a_sparse_tensor_is_refused(tmp_path):
    torch.save({"emb.weight": torch.eye(2).to_sparse()}, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", "no plain array")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"\xff" * 8 + b"{}",
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        b"no" * 99,
    ],
)
@pytest.mark.parametrize("suffix", container.SAFETENSORS)
def test_what_is_no_safetensors_is_refused(content, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    refuse(
        path, r"the file is cut short or no \.safetensors; download it again|holds a dict: must be names with tensors"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="asks for more memory than there is")
def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    """One with holes: it takes no space."""
    size = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total)
    header = json.dumps(
        {
            "first": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            "last": {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.seek(size, os.SEEK_CUR)
        file.write(struct.pack("<f", 1.5))
    tensors = container.read(path)
    assert tensors["last"].item() == 1.5
    assert tensors["first"][-1] == 0
    tensors["last"].fill_(2)  # stays in memory
    assert container.read(path)["last"].item() == 1.5
