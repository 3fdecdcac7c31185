import contextlib
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

from rwkv_core import checkpoint
from rwkv_core.errors import InputError, WorldError


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "emb.weight": torch.randn(5, 4, generator=generator),
        "blocks.0.att.x_r": torch.randn(1, 1, 4, generator=generator).bfloat16(),
        "blocks.0.att.r_k": torch.randn(2, 2, generator=generator).half(),
        "blocks.0.att.a0": torch.randn(1, 1, 4, generator=generator),
        "count": torch.tensor([3, 4]),
    }


def names(folder):
    return [path.name for path in folder.iterdir()]


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(one[name], other[name]), name


def test_round_trip(tensors, tmp_path):
    checkpoint.write(tmp_path / "model.pth", tensors)
    same(checkpoint.read(tmp_path / "model.pth"), tensors)
    same(torch.load(tmp_path / "model.pth", weights_only=True), tensors)
    assert names(tmp_path) == ["model.pth"]


def test_reads_the_older_format_without_an_archive(tensors, tmp_path):
    torch.save(tensors, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    same(checkpoint.read(tmp_path / "model.pth"), tensors)


@pytest.mark.parametrize("dtype", checkpoint.DTYPES)
def test_converts_what_is_a_fraction(dtype, tensors, tmp_path):
    checkpoint.write(tmp_path / "model.pth", tensors, dtype)
    want = {name: x.to(checkpoint.DTYPES[dtype]) if x.is_floating_point() else x for name, x in tensors.items()}
    same(checkpoint.read(tmp_path / "model.pth"), want)


def storage_bytes(path):
    seen = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in torch.load(path).values()}
    return len(seen), sum(seen.values())


def test_each_tensor_has_a_storage_of_its_own_and_no_larger(tmp_path):
    big = torch.randn(1000, 1000)
    tied = torch.randn(3, 3)
    views = {"row": big[3], "corner": big[:2, :2], "turned": big[:4, :2].T, "one": tied, "other": tied}
    checkpoint.write(tmp_path / "model.pth", views)
    same(checkpoint.read(tmp_path / "model.pth"), views)
    assert storage_bytes(tmp_path / "model.pth") == (5, 4 * (1000 + 4 + 8 + 9 + 9))
    assert (tmp_path / "model.pth").stat().st_size < 20_000


def test_same_tensors_are_same_bytes(tensors, tmp_path):
    """Whatever the file's name, the tensors' memory layout, and whether they are parameters, views, or share storage."""
    checkpoint.write(tmp_path / "a.pth", tensors)
    checkpoint.write(tmp_path / "another name.pth", {name: x.clone() for name, x in tensors.items()})
    parameters = {n: torch.nn.Parameter(x) if x.is_floating_point() else x for n, x in tensors.items()}
    checkpoint.write(tmp_path / "c.pth", parameters)
    odd = dict(tensors)
    odd["emb.weight"] = tensors["emb.weight"].T.contiguous().T
    odd["blocks.0.att.a0"] = tensors["blocks.0.att.a0"].reshape(4, 1, 1).permute(1, 2, 0)  # strides (1, 1, 1)
    checkpoint.write(tmp_path / "d.pth", odd)
    assert len({(tmp_path / name).read_bytes() for name in names(tmp_path)}) == 1
    tied = torch.ones(3)
    checkpoint.write(tmp_path / "tied", {"a": tied, "b": tied})
    checkpoint.write(tmp_path / "untied", {"a": torch.ones(3), "b": torch.ones(3)})
    assert (tmp_path / "tied").read_bytes() == (tmp_path / "untied").read_bytes()


def odd_tensors():
    """Of every dtype that a file may have, more than ten, some without an axis or an element."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
    shapes = ((5, 4), (1, 1, 7), (), (0, 3), (300, 70))
    return {
        f"{dtype}.{i}": torch.randint(2, shape, generator=generator).to(dtype)
        for dtype in dtypes
        for i, shape in enumerate(shapes)
    }


def test_the_bytes_are_those_of_torch_save(tmp_path):
    tensors = odd_tensors()
    checkpoint.write(tmp_path / "model.pth", tensors)
    with (tmp_path / "whole").open("wb") as file:
        torch.save(tensors, file)
    assert (tmp_path / "model.pth").read_bytes() == (tmp_path / "whole").read_bytes()
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        assert archive.testzip() is None
    same(torch.load(tmp_path / "model.pth", weights_only=True, mmap=True), tensors)


def sizes(tensors):
    return {name: (x.shape, x.dtype) for name, x in tensors.items()}


def test_a_tensor_is_asked_for_when_the_one_before_it_is_in_the_file(tmp_path):
    tensors = {str(i): torch.full((50_000,), float(i)) for i in range(5)}
    written = []

    def each():
        for x in tensors.values():
            written.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
            yield x

    checkpoint.write_each(tmp_path / "model.pth", sizes(tensors), each())
    assert all(after - before >= 200_000 for before, after in itertools.pairwise(written))
    same(checkpoint.read(tmp_path / "model.pth"), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[:-1], r"count is nothing; it must be torch.int64 \(2,\)"),
        (lambda tensors: [*tensors, tensors[0]], "there are more tensors than names"),
        (lambda tensors: [tensors[0].half(), *tensors[1:]], r"emb.weight is torch.float16 \(5, 4\); it must be torch.float"),
        (lambda tensors: [tensors[0][1:], *tensors[1:]], r"emb.weight is torch.float32 \(4, 4\); it must be .* \(5, 4\)"),
    ],
)  # fmt: skip
def test_other_tensors_than_were_promised_leave_no_file(change, message, tensors, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoint.write_each(tmp_path / "model.pth", sizes(tensors), change(list(tensors.values())))
    assert names(tmp_path) == []


def test_what_is_read_can_be_written_over_the_file_it_comes_from(tensors, tmp_path):
    path = tmp_path / "model.pth"
    checkpoint.write(path, tensors)
    checkpoint.write(path, checkpoint.read(path))
    same(checkpoint.read(path), tensors)


@pytest.mark.parametrize("prefix", ["_forward_module.", "model.", "base_model.model.", "_forward_module.model."])
def test_prefixes_of_trainers_are_removed(prefix, tensors, tmp_path):
    torch.save({prefix + name: x for name, x in tensors.items()}, tmp_path / "model.pth")
    same(checkpoint.read(tmp_path / "model.pth"), tensors)


def test_two_names_that_become_one_are_refused(tmp_path):
    torch.save({"model.emb.weight": torch.zeros(2), "emb.weight": torch.ones(2)}, tmp_path / "model.pth")
    with pytest.raises(InputError, match="two entries are this tensor"):
        checkpoint.read(tmp_path / "model.pth")


def refuse(path, rule):
    before = sorted(path.parent.iterdir())
    with pytest.raises(InputError, match=rule) as caught:
        checkpoint.read(path)
    assert all((caught.value.value, caught.value.rule, caught.value.remedy))
    assert str(path) in str(caught.value)
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "older format"])
def test_a_file_cut_short_is_refused_at_every_length(legacy, tensors, tmp_path):
    torch.save(tensors, tmp_path / "whole", _use_new_zipfile_serialization=not legacy)
    data = (tmp_path / "whole").read_bytes()
    path = tmp_path / "model.pth"
    for length in {*range(0, len(data), 97), *range(8), *range(len(data) - 40, len(data))}:
        path.write_bytes(data[:length])
        # the older format is a bare pickle: cut within a name, it asks for half a name
        refuse(path, r"cut short or no \.pth; download it again" + (r"|asks for \S+: " if legacy else ""))


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "older format"])
def test_a_damaged_file_is_read_or_refused(legacy, tensors, tmp_path):
    """A byte of a number may go unnoticed; anything else is a refusal in our words."""
    torch.save(tensors, tmp_path / "whole", _use_new_zipfile_serialization=not legacy)
    data = (tmp_path / "whole").read_bytes()
    path = tmp_path / "model.pth"
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        with contextlib.suppress(InputError):
            checkpoint.read(path)


@pytest.mark.parametrize("content", [b"", b"a text, not a model\n" * 50, b"\x00" * 5000, b"PK\x03\x04" + b"\x00" * 500])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    refuse(path, r"\d+ bytes that can't be read .*; download it again")


def test_a_missing_file_is_named(tmp_path):
    refuse(tmp_path / "no.pth", "no checkpoint is there; correct the path")
    refuse(tmp_path, "no checkpoint is there")


class Attack:
    """Runs a command when it is unpickled without care."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "older format"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_refused_by_name(legacy, tmp_path):
    marker, path = tmp_path / "it_ran", tmp_path / "model.pth"
    torch.save({"emb.weight": Attack(marker)}, path, _use_new_zipfile_serialization=not legacy)
    refuse(path, r"asks for posix\.system: .* must not run code; do not trust this file")
    path.write_bytes(pickle.dumps(Attack(marker)))
    refuse(path, "asks for posix|can't be read")
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists(), "the attack does not work, so this test shows nothing"


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ([torch.zeros(2)], "holds a list: must be names with tensors; give an RWKV"),
        (torch.zeros(2), "holds a Tensor"),
        ({}, "holds a dict"),
        ({"emb.weight": torch.zeros(2), "epoch": 3}, "'epoch' is a int: every entry must be a tensor"),
        ({"state_dict": {"emb.weight": torch.zeros(2)}}, "'state_dict' is a dict"),
        ({0: torch.zeros(2)}, "0"),
    ],
    ids=["list", "tensor", "empty", "number", "nested", "no name"],
)
def test_what_is_not_names_with_tensors_is_refused(content, rule, tmp_path):
    torch.save(content, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", rule)


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from rwkv_core import checkpoint
from rwkv_core.errors import WorldError
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # a file that grows further meets EFBIG, as on a full disk
try:
    checkpoint.write(Path(sys.argv[1]), {str(i): torch.ones(10_000) for i in range(20)})
except WorldError as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_leaves_the_previous_file_whole(tensors, tmp_path):
    path = tmp_path / "model.pth"
    checkpoint.write(path, tensors)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "MB free: the output needs more than that; free some space and run again" in done.stdout
    assert path.read_bytes() == before
    assert names(tmp_path) == ["model.pth"]


def test_a_folder_that_cannot_be_is_named(tensors, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorldError, match="a file stands where a folder must be; move it away"):
        checkpoint.write(tmp_path / "file" / "model.pth", tensors)


def resident_file_pages():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssFile"))


def test_converting_leaves_no_second_copy_in_memory(tmp_path):
    """The pages of a mapped file count as this process's memory once they are read."""
    size = 2**24
    torch.save({str(i): torch.full((size // 2,), i + 0.5).bfloat16() for i in range(4)}, tmp_path / "model.pth")
    tensors = checkpoint.read(tmp_path / "model.pth")
    before = resident_file_pages()
    checkpoint.convert(tensors, torch.float32)
    assert resident_file_pages() - before < size
    assert all((x == i + 0.5).all() and x.dtype == torch.float32 for i, x in enumerate(tensors.values()))
    tensors = checkpoint.read(tmp_path / "model.pth")
    assert float(sum(x.float().sum() for x in tensors.values())) > 0
    assert resident_file_pages() - before > 3 * size, "reading leaves nothing behind, so this test shows nothing"


def test_converting_changes_nothing_else(tmp_path):
    """Tensors that are in memory, or that nothing is to be done about, stay; so does what shares memory with one."""
    memory = torch.arange(100_000.0)
    torch.save({"a": torch.arange(100_000.0)}, tmp_path / "model.pth")
    mapped = checkpoint.read(tmp_path / "model.pth")["a"]
    tensors = {"memory": memory, "part": memory[5000:9000], "mapped": mapped, "again": mapped[:20_000]}
    checkpoint.convert(tensors, torch.float64)
    for x in (memory, mapped, tensors["memory"], tensors["mapped"]):
        assert torch.equal(x.double(), torch.arange(100_000.0, dtype=torch.float64))
    assert torch.equal(tensors["part"], torch.arange(5000.0, 9000.0, dtype=torch.float64))
    assert torch.equal(tensors["again"], torch.arange(20_000.0, dtype=torch.float64))
    kept = dict(tensors)
    checkpoint.convert(tensors, None)
    checkpoint.convert(tensors, torch.float64)
    assert all(tensors[name] is x for name, x in kept.items())
