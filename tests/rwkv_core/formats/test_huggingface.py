"""Against names and shapes that the converters of fla and of RWKV make, written down here once more."""

import json

import checkpoints
import pytest
import torch
from checkpoints import same

from rwkv_core import checkpoint, models
from rwkv_core.errors import InputError
from rwkv_core.formats import huggingface, order

C, N, D, F, V = 40, 8, 32, 160, 24  # D: all four ranks, at this width

FLA = {
    "model.embeddings.weight": (V, C),
    "model.layers.0.pre_norm.weight": (C,),
    "model.layers.0.pre_norm.bias": (C,),
    **{
        f"model.layers.{i}.{name}": shape
        for i in (0, 1)
        for name, shape in {
            "attn_norm.weight": (C,), "attn_norm.bias": (C,), "ffn_norm.weight": (C,), "ffn_norm.bias": (C,),
            **{f"attn.x_{x}": (1, 1, C) for x in "rwkvag"},
            "attn.k_k": (C,), "attn.k_a": (C,), "attn.r_k": (C // N, N),
            **{f"attn.{x}_proj.weight": (C, C) for x in "rkvo"},
            **{f"attn.{x}_lora.lora.0.weight": (D, C) for x in "wavg" if x != "v" or i},
            **{f"attn.{x}_lora.lora.2.weight": (C, D) for x in "wavg" if x != "v" or i},
            **{f"attn.{x}_lora.lora.2.bias": (C,) for x in "wav" if x != "v" or i},
            "attn.g_norm.weight": (C,), "attn.g_norm.bias": (C,),
            "ffn.x_k": (C,), "ffn.key.weight": (F, C), "ffn.value.weight": (C, F),
        }.items()
    },
    "model.norm.weight": (C,),
    "model.norm.bias": (C,),
    "lm_head.weight": (V, C),
}  # fmt: skip


def read_back(tensors):
    pairs = [pair for name, x in tensors.items() for pair in huggingface.to_official(name, x)]
    assert len(dict(pairs)) == len(pairs)
    return order.official(dict(pairs))


@pytest.mark.parametrize("version", checkpoints.VERSIONS)
def test_the_two_directions_are_inverse(version):
    tensors = checkpoints.official(version)
    converted = huggingface.from_official(tensors)
    assert not converted.keys() & tensors.keys() - {"head.weight"}
    same(read_back(converted), tensors)
    same(read_back(tensors), tensors)  # official names stay as they are


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("version", checkpoints.VERSIONS)
def test_a_folder_is_read(version, parts, tmp_path):
    tensors = checkpoints.official(version)
    same(checkpoint.read(checkpoints.save_huggingface(tmp_path, tensors, parts)), tensors)
    assert models.load(tmp_path).config.version == version


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_one_file_is_read_whatever_else_a_trainer_leaves(name, tmp_path):
    tensors = checkpoints.official("7")
    converted = huggingface.from_official(tensors)
    save = checkpoints.save_safetensors if name.endswith("safetensors") else checkpoints.save_pth
    save(tmp_path, converted, name)
    torch.save({"lr": 1}, tmp_path / "optimizer.pt")
    torch.save({"seed": 1}, tmp_path / "training_args.bin")
    same(checkpoint.read(tmp_path), tensors)


def test_rwkv_7_has_the_names_and_shapes_of_fla():
    tensors = checkpoints.official("7")
    converted = huggingface.from_official(tensors)
    assert {name: tuple(x.shape) for name, x in converted.items()} == FLA
    lora = "model.layers.1.attn.w_lora.lora"
    assert torch.equal(converted[f"{lora}.0.weight"], tensors["blocks.1.att.w1"].T)
    assert torch.equal(converted[f"{lora}.2.weight"], tensors["blocks.1.att.w2"].T)
    assert torch.equal(converted[f"{lora}.2.bias"], tensors["blocks.1.att.w0"].flatten())
    assert torch.equal(converted["model.layers.0.attn.o_proj.weight"], tensors["blocks.0.att.output.weight"])


def test_the_value_residual_of_the_first_block_is_left_out():
    tensors = checkpoints.official("7")
    unused = {f"blocks.0.att.{name}": tensors[f"blocks.1.att.{name}"] for name in ("v0", "v1", "v2")}
    assert huggingface.from_official(tensors | unused).keys() == FLA.keys()


def test_token_shifts_may_be_flat_or_in_one_tensor():
    """fla's first versions had all six as x_x, (6, C)."""
    tensors = checkpoints.official("7")
    flat = {n: x.flatten() if ".attn.x_" in n else x for n, x in huggingface.from_official(tensors).items()}
    same(read_back(flat), tensors)
    for i in (0, 1):
        flat[f"model.layers.{i}.attn.x_x"] = torch.stack([flat.pop(f"model.layers.{i}.attn.x_{x}") for x in "rwkvag"])
    same(read_back(flat), tensors)


@pytest.mark.parametrize(
    ("version", "names"),
    [
        (
            "4",
            {
                "rwkv.embeddings.weight", "rwkv.blocks.0.pre_ln.weight", "rwkv.blocks.1.attention.time_mix_receptance",
                "rwkv.blocks.0.attention.time_decay", "rwkv.blocks.1.attention.output.weight", "rwkv.ln_out.bias",
                "rwkv.blocks.0.feed_forward.time_mix_key", "head.weight",
            },
        ),
        ("5.2", {"rwkv.blocks.0.attention.time_mix_gate", "rwkv.blocks.1.attention.time_faaaa"}),
    ],
)  # fmt: skip
def test_rwkv_4_and_5_have_the_names_of_transformers(version, names):
    assert names <= huggingface.from_official(checkpoints.official(version)).keys()


def fla_6(tensors):
    """RWKV-6 as fla's converter makes it of RWKV's own."""
    converted = {}
    for i in (0, 1):
        t = {name.removeprefix(f"blocks.{i}."): x for name, x in tensors.items() if name.startswith(f"blocks.{i}.")}
        w1, w2 = t["att.time_maa_w1"].view(C, 5, -1).unbind(1), t["att.time_maa_w2"].unbind(0)
        of = dict(zip("wkvrg", range(5), strict=True))
        att = {
            "x_proj.0.mu": t["att.time_maa_x"].view(-1),
            "x_proj.0.linear.weight": torch.cat([w1[of[x]] for x in "rwkvg"], -1).t(),
            "x_proj.2.weight": torch.cat([w2[of[x]] for x in "rwkvg"], 0).t(),
            "x_bias": torch.stack([t[f"att.time_maa_{x}"].view(-1) for x in "rwkvg"]),
            "w_proj.linear.lora.0.weight": t["att.time_decay_w1"].t(),
            "w_proj.linear.lora.2.weight": t["att.time_decay_w2"].t(),
            "w_proj.linear.lora.2.bias": t["att.time_decay"].view(-1),
            "bonus": t["att.time_faaaa"],
            "o_proj.weight": t["att.output.weight"],
            "g_norm.weight": t["att.ln_x.weight"],
            "g_norm.bias": t["att.ln_x.bias"],
        }
        att |= {f"{x[0]}_proj.linear.weight": t[f"att.{x}.weight"] for x in ("receptance", "key", "value", "gate")}
        ffn = {
            "key.linear.weight": t["ffn.key.weight"],
            "key.mu": t["ffn.time_maa_k"].view(-1),
            "receptance.linear.weight": t["ffn.receptance.weight"],
            "receptance.mu": t["ffn.time_maa_r"].view(-1),
            "value.weight": t["ffn.value.weight"],
        }
        norms = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
        block = {f"attn.{n}": x for n, x in att.items()} | {f"ffn.{n}": x for n, x in ffn.items()}
        block |= {f"{norms[n[:3]]}{n[3:]}": x for n, x in t.items() if n[:3] in norms}
        converted |= {f"model.layers.{i}.{name}": x for name, x in block.items()}
    outside = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
    converted |= {outside[n.split(".")[0]] + "." + n.split(".")[1]: x for n, x in tensors.items() if n[:6] != "blocks"}
    return converted


def test_rwkv_6_of_fla_is_read(tmp_path):
    tensors = checkpoints.official("6")
    checkpoints.save_safetensors(tmp_path, fla_6(tensors))
    same(checkpoint.read(tmp_path), tensors)
    assert models.load(tmp_path).config.version == "6"


def test_rwkv_6_has_the_names_and_shapes_of_fla():
    tensors = checkpoints.official("6")
    ours, theirs = huggingface.from_official(tensors), fla_6(tensors)
    same({name: ours[name] for name in sorted(ours)}, {name: theirs[name] for name in sorted(theirs)})


def test_rwkv_6_under_rwkvs_own_names_is_read(tmp_path):
    tensors = checkpoints.official("6")
    theirs = {"emb": "embeddings", "att": "attention", "ffn": "feed_forward", "ln0": "pre_ln"}
    own = {".".join(theirs.get(part, part) for part in name.split(".")): x for name, x in tensors.items()}
    own = {name if name == "head.weight" else f"rwkv.{name}": x for name, x in own.items()}
    assert {"rwkv.blocks.0.attention.time_maa_w1", "rwkv.blocks.1.feed_forward.time_maa_k"} <= own.keys()
    checkpoints.save_safetensors(tmp_path, own)
    same(checkpoint.read(tmp_path), tensors)


def test_another_model_is_refused_by_its_names(tmp_path):
    checkpoints.save_safetensors(tmp_path, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)})
    with pytest.raises(InputError, match="has no RWKV names"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "divisor"),
    [
        ({"model_type": "rwkv7", "head_dim": 64, "norm_eps": 1e-5}, 8.0),
        ({"model_type": "rwkv7", "head_dim": 16, "norm_eps": 1e-5}, 4.0),
        ({"model_type": "rwkv7", "head_dim": 64}, None),
        ({"model_type": "rwkv6", "head_size_divisor": 8}, 8.0),
        ({"model_type": "rwkv6"}, None),
        ({"model_type": "rwkv7", "head_dim": "x", "norm_eps": None}, None),
        ([], None),
        (None, None),
    ],
)
def test_the_divisor_that_a_config_implies(config, divisor, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert huggingface.head_size_divisor(tmp_path) == (None if divisor is None else pytest.approx(divisor))
