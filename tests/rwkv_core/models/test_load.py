import checkpoints
import pytest
import torch
from checkpoints import same

from rwkv_core import checkpoint, models
from rwkv_core.errors import InputError


@pytest.mark.parametrize("dtype", ["as_loaded", "bf16", "fp32"])
@pytest.mark.parametrize("version", checkpoints.VERSIONS)
def test_a_file_loaded_and_saved_is_the_file(version, dtype, tmp_path):
    """Names, order, shapes such as (1, 1, C), dtypes and values; and nothing that two tensors share, nor hidden bytes."""
    tensors = checkpoints.official(version, dtype=torch.bfloat16)
    path = checkpoints.save_pth(tmp_path, tensors)
    checkpoint.write(tmp_path / "again.pth", models.load(path).state_dict(), dtype)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    same(again, {name: x.to(checkpoint.DTYPES.get(dtype, x.dtype)) for name, x in tensors.items()})
    assert len({x.untyped_storage().data_ptr() for x in again.values()}) == len(again)
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in again.values())
    if dtype == "as_loaded":
        checkpoint.write(tmp_path / "same.pth", tensors)
        assert (tmp_path / "same.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()


@pytest.mark.parametrize("form", checkpoints.FORMS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_every_form_loads_as_the_same_model(form, dtype, tmp_path):
    tensors = checkpoints.official("7")
    model = models.load(checkpoints.FORMS[form](tmp_path, tensors), dtype=dtype)
    same(model.state_dict(), {name: x.to(dtype or x.dtype) for name, x in tensors.items()})


@pytest.mark.parametrize("version", checkpoints.VERSIONS)
def test_one_message_names_all_that_is_wrong(version, tmp_path):
    """Missing, unknown, of a wrong shape, of a wrong dtype: whoever mends a file should not have to do so in steps."""
    tensors = checkpoints.official(version)
    for name in ("blocks.1.ln1.bias", "ln_out.weight"):
        del tensors[name]
    tensors |= {"blocks.0.att.extra": torch.zeros(2), "another.weight": torch.zeros(2)}
    tensors["head.weight"] = tensors["head.weight"].T.contiguous()
    tensors["blocks.0.ln2.weight"] = torch.ones(40, dtype=torch.int32)
    with pytest.raises(InputError) as caught:
        models.load(checkpoints.save_pth(tmp_path, tensors))
    assert all((caught.value.value, caught.value.rule, caught.value.remedy))
    for part in (
        str(tmp_path / "model.pth"), "lacks blocks.1.ln1.bias, ln_out.weight",
        "unknown another.weight, blocks.0.att.extra", "wrong shape head.weight", "wrong dtype blocks.0.ln2.weight",
    ):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_what_no_model_computes_in_is_refused(dtype, tmp_path):
    tensors = checkpoints.official("7")
    tensors["emb.weight"] = torch.ones(24, 40).to(dtype)
    for form in ("pth", "safetensors"):
        with pytest.raises(InputError, match=r"wrong dtype emb\.weight"):
            models.load(checkpoints.FORMS[form](tmp_path, tensors))


def test_a_file_of_two_dtypes_is_loaded_when_one_is_asked_for(tmp_path):
    tensors = checkpoints.official("7")
    tensors["blocks.0.att.w0"] = tensors["blocks.0.att.w0"].float()
    path = checkpoints.save_safetensors(tmp_path, tensors)
    with pytest.raises(InputError, match="has float16, float32: a model computes in one dtype; say which"):
        models.load(path)
    same(models.load(path, dtype=torch.float32).state_dict(), {name: x.float() for name, x in tensors.items()})


@pytest.mark.parametrize(
    ("version", "changed", "message"),
    [
        (
            "6",
            {"blocks.0.att.time_faaaa": torch.zeros(5, 0).half()},
            r"time_faaaa is \(5, 0\); its heads must share 40",
        ),
        (
            "6",
            {"blocks.0.att.time_faaaa": torch.zeros(3, 7).half()},
            r"time_faaaa is \(3, 7\); its heads must share 40",
        ),
        ("7", {"blocks.0.att.r_k": torch.zeros(5, 0).half()}, r"r_k is \(5, 0\); its heads must share the 40"),
        ("4", {"blocks.999999999.ln1.bias": torch.zeros(40).half()}, r"blocks\.999999999"),
        ("7", {"blocks.999999999.ln1.bias": torch.zeros(40).half()}, r"blocks\.999999999"),
    ],
)
def test_sizes_that_no_model_has_are_refused(version, changed, message, tmp_path):
    path = checkpoints.save_pth(tmp_path, checkpoints.official(version) | changed)
    with pytest.raises(InputError, match=message):
        models.load(path)
