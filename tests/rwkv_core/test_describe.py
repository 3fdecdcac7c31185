import pytest
import torch
from methods import EXAMPLES, OTHERS
from random_models import VERSIONS
from safetensors.torch import save_file

from rwkv_core import checkpoint
from rwkv_core.adapters import attach, file, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.describe import describe
from rwkv_core.errors import InputError
from rwkv_core.files import sha256


@pytest.mark.parametrize("version", VERSIONS)
def test_a_model(version, random_model, tmp_path):
    model = random_model(version=version)
    checkpoint.write(tmp_path / "m.pth", model.state_dict(), "bf16")
    found = describe(tmp_path / "m.pth")
    assert found["is"] == f"a model, RWKV-{version}"
    assert (found["n_layer"], found["n_embd"], found["vocab_size"]) == (3, 32, 64)
    count = len(model.state_dict())
    assert found["tensors"] == f"{count}, {count} bfloat16"
    assert found["parameters"] == sum(x.numel() for x in model.state_dict().values())
    assert found["sha256"] == sha256(tmp_path / "m.pth")


@pytest.mark.parametrize("config", EXAMPLES + OTHERS, ids=lambda config: f"{config.kind}-{config.state}")
def test_an_adapter_of_ours(config, tiny, tmp_path):
    attach(tiny, config, seed=0)
    record = AdapterRecord(format=1, adapter=config, base_sha256="b", data_sha256="d", vocabulary_sha256="v", run="r")
    file.write(tmp_path / "a.pth", trained_state(tiny), record)
    found = describe(tmp_path / "a.pth")
    state = {"none": ""}.get(config.state, ": a tuned state" if config.kind == "state" else ", with a tuned state")
    assert found["is"] == f"an adapter of RWKV-Flow{state}"
    assert (found["kind"], found["state"], found["layers"]) == (config.kind, config.state, config.layers)
    assert (found["base_sha256"], found["run"]) == ("b", "r")
    assert found["parameters"] == sum(x.numel() for x in trained_state(tiny).values())


def names(part):
    return [f"blocks.{i}.{m}.{part}" for i in range(2) for m in ("att.key", "ffn.value")]


@pytest.mark.parametrize(
    ("parts", "kind", "rank"),
    [
        ({"lora_A": (4, 32), "lora_B": (32, 4)}, "lora", "4"),
        ({"init_lora_A": (4, 32), "init_lora_B": (32, 4)}, "pissa", "4"),
        ({"disha": (8, 32)}, "bone", "8"),
        ({"bone": (8, 32)}, "bone", "8"),
        ({"disha": (4, 8, 8)}, "bat", "8"),
        ({"bone": (4, 8, 8)}, "bat", "8"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_adapter_of_another_program(parts, kind, rank, prefix, tmp_path):
    tensors = {prefix + name: torch.zeros(shape) for part, shape in parts.items() for name in names(part)}
    torch.save(tensors | {f"{prefix}ln_out.bias": torch.zeros(32)}, tmp_path / "a.pth")
    found = describe(tmp_path / "a.pth")
    assert found["is"].startswith("an adapter without a record")
    assert (found["kind"], found["rank"], found["layers"]) == (kind, rank, 2)
    assert (found["targets"], found["trained as they are"]) == ("att.key, ffn.value", "ln_out.bias")


def test_an_adapter_of_hugging_face(tmp_path):
    tensors = {f"base_model.model.{name}": torch.zeros(8, 32) for name in names("miss_block")}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = describe(tmp_path / "adapter_model.safetensors")
    assert (found["kind"], found["rank"]) == ("bone", "8")
    tensors = {f"base_model.model.{name}": torch.zeros(4, 32) for name in names("lora_A.weight")}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = describe(tmp_path / "adapter_model.safetensors")
    assert (found["kind"], found["rank"], found["targets"]) == ("lora", "4", "att.key, ffn.value")


def test_a_state(tmp_path):
    torch.save({f"blocks.{i}.att.time_state": torch.zeros(4, 8, 8) for i in range(3)}, tmp_path / "s.pth")
    found = describe(tmp_path / "s.pth")
    assert found["is"] == "a tuned state"
    assert (found["n_layer"], found["n_embd"], found["head_size"]) == (3, 32, 8)


def test_a_state_with_token_shift_says_who_mounts_it(tiny, tmp_path):
    attach(tiny, OTHERS[-1].model_copy(update={"also": ()}), seed=0)
    torch.save(trained_state(tiny), tmp_path / "s.pth")
    found = describe(tmp_path / "s.pth")
    assert found["is"] == "a tuned state with token shift, which RWKV-Flow alone mounts"
    assert (found["n_layer"], found["n_embd"], found["head_size"]) == (3, 32, 8)


def test_a_model_with_states_says_who_reads_them(tiny, tmp_path):
    states = {f"blocks.{i}.att.time_state": torch.zeros(4, 8, 8) for i in range(3)}
    checkpoint.write(tmp_path / "m.pth", tiny.state_dict() | states)
    assert "RWKV-7's clients read them from a file of their own" in describe(tmp_path / "m.pth")["tuned states"]


def test_what_is_nothing_of_these_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"x.pth has no RWKV names \(a, ...\)"):
        describe(tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"is there|no such"):
        describe(tmp_path / "none.pth")
