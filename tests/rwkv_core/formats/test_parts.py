import json

import checkpoints
import pytest
import torch
from checkpoints import same

from rwkv_core import checkpoint
from rwkv_core.errors import InputError


@pytest.fixture
def tensors():
    return checkpoints.official("7")


def split(tensors, parts):
    names = list(tensors)
    return [{name: tensors[name] for name in names[i::parts]} for i in range(parts)]


SCHEMES = [
    "model-{:05}-of-00003.safetensors",
    "RWKV-x070-1.5B-{}-of-3.pth",
    "pytorch_model_{:02}_of_03.bin",
    "part.{}of3.pth",
]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbered_parts_are_one_checkpoint(scheme, first, tensors, tmp_path):
    save = checkpoints.save_safetensors if scheme.endswith("safetensors") else checkpoints.save_pth
    files = [save(tmp_path, part, scheme.format(i + first)) for i, part in enumerate(split(tensors, 3))]
    for given in (tmp_path, *files):
        same(checkpoint.read(given), tensors)


def refuse(path, match):
    with pytest.raises(InputError, match=match) as caught:
        checkpoint.read(path)
    assert all((caught.value.value, caught.value.rule, caught.value.remedy))
    assert str(path) in str(caught.value)


def test_missing_parts_are_named(tensors, tmp_path):
    name = "model-{:05}-of-00003.safetensors"
    file = checkpoints.save_safetensors(tmp_path, tensors, name.format(2))
    rule = "of 3 parts, model-00001-of-00003.safetensors, model-00003-of-00003.safetensors missing: all must be there"
    refuse(file, rule)
    with pytest.raises(InputError, match=rule):
        checkpoint.read(tmp_path)


def test_missing_parts_of_an_index_are_named(tensors, tmp_path):
    checkpoints.save_huggingface(tmp_path, tensors, parts=6)
    for i in (2, 3, 5, 6):
        (tmp_path / f"model-{i:05}-of-00006.safetensors").unlink()
    refuse(
        tmp_path / "model.safetensors.index.json",
        r"of 6 parts, model-00002-of-00006.safetensors, \S+, \S+ and 1 more missing: .*; download the rest",
    )


def test_a_tensor_that_only_the_index_has_is_named(tensors, tmp_path):
    checkpoints.save_huggingface(tmp_path, tensors)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.attn.r_k"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refuse(tmp_path, r"model\.layers\.9\.attn\.r_k: the index has it, and no part does; download the checkpoint again")


def test_a_tensor_in_two_parts_is_refused(tensors, tmp_path):
    parts = split(tensors, 2)
    checkpoints.save_pth(tmp_path, parts[0], "model-1-of-2.pth")
    twice = checkpoints.save_pth(tmp_path, parts[1] | {"model.emb.weight": tensors["emb.weight"]}, "model-2-of-2.pth")
    refuse(twice, r"model-2-of-2\.pth: 'model\.emb\.weight': two entries are this tensor")


def test_two_names_of_one_tensor_are_refused(tensors, tmp_path):
    twice = tensors | {"lm_head.weight": tensors["head.weight"]}
    refuse(checkpoints.save_pth(tmp_path, twice), "two entries are this tensor")


def test_a_folder_of_two_checkpoints_is_refused(tensors, tmp_path):
    for name in ("a.pth", "b.pth"):
        checkpoints.save_pth(tmp_path, tensors, name)
    refuse(tmp_path, r"has a\.pth, b\.pth: it must hold one checkpoint; give one of the files")
    (tmp_path / "b.pth").unlink()
    same(checkpoint.read(tmp_path), tensors)


def test_a_folder_without_any_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("nothing here")
    refuse(tmp_path, "no checkpoint is there")
    refuse(tmp_path / "model.safetensors.index.json", "no index is there")


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000,
        '{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": ""}}', '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": "/etc/passwd", "b": 2}}', "\ud800",
    ],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(content, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    refuse(path, "must map the names of tensors to files beside it; download it again")


def test_parts_that_are_no_checkpoint_are_named(tensors, tmp_path):
    torch.save({"emb.weight": 3}, tmp_path / "model-1-of-1.pth")
    refuse(tmp_path / "model-1-of-1.pth", "'emb.weight' is a int")
