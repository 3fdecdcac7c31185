"""Loaded by transformers itself, where it has the model; the tokenizer by it in any case."""

import json
import shutil

import pytest
import random_models
import torch

from rwkv_core import checkpoint, huggingface_folder, models
from rwkv_core.data.dialogue import one_turn
from rwkv_core.tokenizer import VOCAB_SIZE, read_vocabulary, world

SPECIAL = {"<tool>": 65530, "<工具>": 65531}
TEXTS = [
    "User: What is it?\n\nAssistant:** A list\n\n- one\n\n\n", "def f(x):\n        return x ** 2  # 平方\r\n\t\t",
    "。\n\nUser: 你好，世界！ Привет <tool> a<工具>b 🦅🪿 e\u0301 \x00\x01\x7f \u200b", " " * 200 + "x",
]  # fmt: skip


def write(folder, version="7", dtype=torch.float32, part_bytes=1 << 30, **sizes):
    made = random_models.make(version=version, **{"n_embd": 64, "head_size": 1 if version == "4" else 64, **sizes})
    tensors = {name: x.detach() for name, x in made.state_dict().items()}
    of_world = made.config.vocab_size == VOCAB_SIZE
    huggingface_folder.write(
        folder, tensors, made.config, dtype, part_bytes=part_bytes, table=world().table if of_world else (),
        special=SPECIAL if of_world else None,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    write(path, "4", vocab_size=VOCAB_SIZE, n_layer=2)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("text", TEXTS)
def test_its_tokenizer_is_worlds(text, tokenizer):
    ids = world().with_special(SPECIAL).encode(text)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert tokenizer.decode([0, *ids], skip_special_tokens=True) == text


def test_special_tokens_come_back(folder, tmp_path):
    assert checkpoint.special_tokens(folder) == SPECIAL
    for text in ('{"<end>": 0, "<tool>": "65530"}', "[1]", "{"):
        (tmp_path / "added_tokens.json").write_text(text)
        assert checkpoint.special_tokens(tmp_path) == {}


def test_half_a_character_is_decoded(tokenizer):
    whole = world().encode("🦅")
    assert tokenizer.decode(whole) == "🦅"
    assert tokenizer.decode(whole[:1]) == "\ufffd"


def test_it_knows_worlds_dialogues(tokenizer):
    messages = [{"role": "user", "content": " Hi\n \n  there\n"}, {"role": "assistant", "content": "Yo"}]
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": "q"}], tokenize=False, add_generation_prompt=True
    )
    assert text == f"User: {one_turn(messages[0]['content'])}\n\nAssistant: Yo\n\nUser: q\n\nAssistant:"


def test_the_tokenizer_can_be_saved_and_loaded_again(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again(TEXTS[2])["input_ids"] == tokenizer(TEXTS[2])["input_ids"]


def test_the_vocabulary_is_in_the_published_form(folder):
    file = folder / "rwkv_vocab_v20230424.txt"
    assert read_vocabulary(file) == world().table
    lines = file.read_bytes().split(b"\n")
    assert lines[0] == rb"1 '\x00' 1"
    assert lines[-1] == b""
    assert len(lines) == 65529 + 1


def test_transformers_computes_rwkv_4_the_same(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([world().encode(TEXTS[0])])
    with torch.no_grad():
        got, wanted = theirs(ids).logits, models.load(folder)(ids)[0]
    assert type(theirs).__name__ == "RwkvForCausalLM"
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


CONFIG_7 = {
    "architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "hidden_size": 64, "intermediate_size": 256, "head_dim": 64,
    "num_heads": 1, "num_hidden_layers": 3, "value_dim": [64, 64, 64], "hidden_ratio": 4.0, "decay_low_rank_dim": 8,
    "a_low_rank_dim": 6, "v_low_rank_dim": 4, "gate_low_rank_dim": 10, "vocab_size": 96, "norm_eps": 1e-5, "norm_first": True,
    "norm_bias": True, "hidden_act": "sqrelu", "attn_mode": "chunk", "bos_token_id": 0, "eos_token_id": 0, "use_cache": True,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_fla_is_told_every_size(tmp_path):
    write(tmp_path / "7", "7", torch.bfloat16, vocab_size=96)
    assert json.loads((tmp_path / "7/config.json").read_text()) == CONFIG_7
    write(tmp_path / "6", "6", vocab_size=96)
    told = json.loads((tmp_path / "6/config.json").read_text())
    of_6 = {
        "architectures": ["RWKV6ForCausalLM"], "model_type": "rwkv6", "hidden_size": 64, "intermediate_size": 224,
        "num_heads": 1, "expand_k": 1.0, "expand_v": 1.0, "proj_low_rank_dim": 4,
        "gate_low_rank_dim": 6, "norm_eps": 1e-5, "vocab_size": 96,
    }  # fmt: skip
    assert told | of_6 == told


def group_norm(y, eps):
    return (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + eps)


def test_the_receptance_of_rwkv_6_makes_up_for_flas_epsilon(tmp_path):
    """fla's norm has the epsilon 1e-5 where ours has 64e-5; an eighth of what is normed is then the same."""
    made = write(tmp_path / "6", "6", vocab_size=96)
    stored = checkpoint.container.read(tmp_path / "6/model.safetensors")
    ours = made.state_dict()
    for i in range(3):
        assert torch.equal(
            stored[f"model.layers.{i}.attn.r_proj.linear.weight"] * 8, ours[f"blocks.{i}.att.receptance.weight"]
        )
    y = 0.01 * torch.randn(64, dtype=torch.float64)
    torch.testing.assert_close(group_norm(y / 8, 1e-5), group_norm(y, 64e-5))
    assert not torch.allclose(group_norm(y, 1e-5), group_norm(y, 64e-5), rtol=0.1)
    for name, x in checkpoint.read(tmp_path / "6").items():
        assert torch.equal(x, ours[name])
    (tmp_path / "moved").mkdir()
    shutil.copy(
        tmp_path / "6/model.safetensors", tmp_path / "moved"
    )  # fla's own converter does not divide, and does not say
    read = checkpoint.read(tmp_path / "moved/model.safetensors")
    assert torch.equal(read["blocks.0.att.receptance.weight"] * 8, ours["blocks.0.att.receptance.weight"])


def test_parts_are_no_larger_than_they_may_be(tmp_path):
    made = write(tmp_path / "7", "7", torch.float32, part_bytes=100_000, vocab_size=96)
    parts = sorted((tmp_path / "7").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "7/model.safetensors.index.json").read_text())
    assert len(parts) > 3
    assert {path.name for path in parts} == set(index["weight_map"].values())
    assert parts[0].name == f"model-00001-of-{len(parts):05}.safetensors"
    for path in parts:
        held = checkpoint.container.read(path)
        assert sum(x.numel() * 4 for x in held.values()) <= 100_000
        assert {name for name, file in index["weight_map"].items() if file == path.name} == held.keys()
    assert index["metadata"]["total_size"] == sum(x.numel() * 4 for x in made.state_dict().values())
    back = checkpoint.read(tmp_path / "7")
    assert all(torch.equal(back[name], x) for name, x in made.state_dict().items())
