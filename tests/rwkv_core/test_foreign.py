"""Adapters in the layouts of other programs merge to what ours merge to."""

import itertools
import json

import pytest
import torch
from methods import EXAMPLES
from safetensors.torch import save_file

from rwkv_core import checkpoint, foreign
from rwkv_core.adapters import attach, file, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.config import LoraConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.merge import Part, merge
from rwkv_core.quantize import rounded

LORA, PISSA, BONE, BAT, *_ = EXAMPLES
NORMS = BONE.model_copy(update={"also": ("ln*", "ln_out.*")})
V4 = LORA.model_copy(
    update={"targets": ("att.key", "att.value", "att.receptance", "ffn.*"), "also": ("ln*", "att.time_*")}
)


@pytest.fixture
def made(random_model, tmp_path):
    """A base, an adapter of it with random values, and what ours merges to."""

    def make(config, version="7"):
        model = random_model(version=version)
        checkpoint.write(tmp_path / "base.pth", model.state_dict())
        attach(model, config, seed=0)
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: x if "init" in name else x + 0.1 * torch.randn(x.shape, generator=generator)
            for name, x in trained_state(model).items()
        }
        record = AdapterRecord(
            format=1,
            adapter=config,
            base_sha256=sha256(tmp_path / "base.pth"),
            data_sha256="",
            vocabulary_sha256="",
            run="",
        )
        file.write(tmp_path / "own.pth", tensors, record)
        merge(tmp_path / "base.pth", [Part(tmp_path / "own.pth")], tmp_path / "want.pth")
        return tensors, checkpoint.read(tmp_path / "want.pth")

    return make


def assert_merges(tmp_path, path, want, **known):
    receipt = merge(tmp_path / "base.pth", [Part(path, **known)], tmp_path / "merged.pth")
    found = checkpoint.read(tmp_path / "merged.pth")
    assert all(torch.equal(found[name], x) for name, x in want.items())
    [entry] = receipt["adapters"]
    assert (entry["base_checked"], entry["run"]) == (False, None)
    return entry


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("config", "known", "version"),
    [
        (LORA, {"alpha": 7.5}, "7"), (LORA, {"alpha": 7.5}, "6"), (V4, {"alpha": 7.5}, "4"),
        (BONE, {}, "7"), (NORMS, {}, "7"), (BAT, {}, "7"), (BAT, {}, "5.2"),
    ],
)  # fmt: skip
def test_rwkv_peft(config, known, version, prefix, made, tmp_path):
    tensors, want = made(config, version)
    torch.save({prefix + name: x for name, x in tensors.items()}, tmp_path / "rwkv-3.pth")
    entry = assert_merges(tmp_path, tmp_path / "rwkv-3.pth", want, **known)
    assert entry["kind"] == config.kind
    assert entry["settings"]["rank"] == config.rank


@pytest.mark.parametrize("config", [BONE, BAT], ids=lambda config: config.kind)
def test_the_older_name_of_bone(config, made, tmp_path):
    tensors, want = made(config)
    torch.save({name.replace("disha", "bone"): x for name, x in tensors.items()}, tmp_path / "rwkv-0.pth")
    assert_merges(tmp_path, tmp_path / "rwkv-0.pth", want)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_pissa_of_two_files(prefix, made, tmp_path):
    tensors, want = made(PISSA)
    torch.save({n: x for n, x in tensors.items() if "init" not in n}, tmp_path / "rwkv-0.pth")
    torch.save({prefix + n: x for n, x in tensors.items() if "init" in n}, tmp_path / "init_pissa.pth")
    entry = assert_merges(tmp_path, tmp_path / "rwkv-0.pth", want, init=tmp_path / "init_pissa.pth")
    assert entry["kind"] == "pissa"


@pytest.fixture
def folder(made, tmp_path):
    """Hugging Face's, of a LoRA, with changes to its config."""

    def make(config=LORA, **changes):
        tensors, want = made(config)
        renamed = {
            f"base_model.model.{name.replace('disha', 'miss_block')}"
            + (".weight" if name.endswith(("_A", "_B")) else ""): x.contiguous()
            for name, x in tensors.items()
        }
        (tmp_path / "hf").mkdir()
        save_file(renamed, tmp_path / "hf" / "adapter_model.safetensors")
        about = {"peft_type": "LORA", "r": 3, "lora_alpha": 7.5} if config.kind == "lora" else {"peft_type": "MISS"}
        (tmp_path / "hf" / "adapter_config.json").write_text(json.dumps(about | changes))
        return tmp_path / "hf", want

    return make


def test_a_folder_of_hugging_face(folder, tmp_path):
    path, want = folder()
    assert_merges(tmp_path, path, want)


def test_rslora_of_hugging_face(folder, tmp_path):
    config = LoraConfig(**LORA.model_dump() | {"rank_stabilized": True})
    path, want = folder(config, use_rslora=True)
    assert_merges(tmp_path, path, want)


def test_dora_of_hugging_face(folder, tmp_path):
    path, want = folder(LoraConfig(**LORA.model_dump() | {"dora": True}), use_dora=True)
    assert assert_merges(tmp_path, path, want)["settings"]["dora"]


def test_miss_of_hugging_face(folder, tmp_path):
    path, want = folder(BONE)
    assert_merges(tmp_path, path, want)


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "pissa_niter_4"},
        {"rank_pattern": {"key": 2}},
    ],
    ids=str,
)
def test_methods_of_hugging_face_that_mean_something_else_are_refused(change, folder):
    path, _ = folder(**change)
    with pytest.raises(
        InputError, match=f"{next(iter(change))} = .*: this method is not known here; merge it with peft"
    ):
        foreign.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "adapter_config.json: must be JSON: .*; copy the folder again"),
        (b"\xff\xfe", "adapter_config.json: must be JSON: .*; copy the folder again"),
        ("[1]", "adapter_config.json is a list: must name settings"),
        ('{"peft_type": "LORA", "lora_alpha": "much"}', "adapter_model.safetensors: alpha is 'much': .*valid number"),
    ],
)
def test_a_config_that_can_not_be_read_is_refused(text, message, folder):
    path, _ = folder()
    (path / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        foreign.read(path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"hf: it has no adapter_config\.json; give"):
        foreign.read(path)


def test_the_config_beside_a_file_of_hugging_face_is_read(folder, tmp_path):
    path, want = folder()
    assert_merges(tmp_path, path / "adapter_model.safetensors", want)


def test_a_rank_that_is_not_that_of_the_tensors_is_refused(folder):
    path, _ = folder(r=4)
    with pytest.raises(InputError, match=r"adapter_config.json says r = 4: its tensors are of rank 3; copy it again"):
        foreign.read(path)


@pytest.mark.parametrize(
    ("adapter", "base", "message"),
    [
        (
            {"version": "6"},
            {},
            r"adapter.targets has 'ffn.receptance': does not fit the base: .*; there are att.*ffn.value",
        ),
        ({}, {"version": "6"}, r"blocks.0.ffn.key: does not fit the base: has .*\(5, 128\).*it must be .*\(5, 96\)"),
        ({"n_layer": 4}, {}, r"adapter.layers has 3: does not fit the base: the model's layers are 0 to 2; name some"),
        ({"n_embd": 64}, {}, r"emb.weight: does not fit the base: is \(64, 64\); it must be \(64, 32\)"),
        ({"vocab_size": 65}, {}, r"emb.weight: does not fit the base: is \(65, 32\); it must be \(64, 32\)"),
    ],
    ids=str,
)
def test_adapters_of_other_models_are_refused_with_both_values(adapter, base, message, random_model, tmp_path):
    model = random_model(**adapter)
    attach(model, BONE.model_copy(update={"also": ("emb.weight",)}), seed=0)
    torch.save(trained_state(model), tmp_path / "rwkv-0.pth")
    checkpoint.write(tmp_path / "base.pth", random_model(**base).state_dict())
    with pytest.raises(InputError, match=rf"rwkv-0.pth: {message}"):
        merge(tmp_path / "base.pth", [Part(tmp_path / "rwkv-0.pth")], tmp_path / "merged.pth")


def test_alpha_must_be_more_than_nothing(made, tmp_path):
    tensors, _ = made(LORA)
    torch.save(tensors, tmp_path / "rwkv-3.pth")
    with pytest.raises(InputError, match=r"rwkv-3.pth: alpha is 0.0: Input should be greater than 0; say what it was"):
        foreign.read(tmp_path / "rwkv-3.pth", alpha=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "ADALORA"}, "adapter.config.peft_type = ADALORA: its ranks are decided during training"),
        ({"peft_type": "VERA"}, "adapter.config.peft_type = VERA: its matrices share tensors"),
        ({"peft_type": "LOHA", "rank_pattern": {"key": 2}}, "adapter.config.rank_pattern = .*: where a method works"),
        ({"peft_type": "NEW"}, "adapter.config.peft_type = NEW: peft has no such method"),
    ],
    ids=str,
)
def test_methods_of_hugging_face_that_can_not_work_are_refused(change, message, folder):
    path, _ = folder(**change)
    with pytest.raises(InputError, match=message):
        foreign.read(path)


def test_miss_with_blocks_of_outputs_is_not_taken_for_bat(folder):
    path, _ = folder(BONE, init_weights="bat")
    tensors, config = foreign.read(path)
    assert (config.kind, config.config) == ("peft", {"peft_type": "MISS", "init_weights": "bat"})
    assert {name.rpartition(".")[2] for name in tensors} == {"miss_block"}
    (path / "adapter_config.json").unlink()
    save_file({"base_model.model.blocks.0.att.key.miss_block": torch.ones(4, 8, 8)}, path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r'miss_block \(4, 8, 8\): MiSS in its mode "bat" is not known here; merge'):
        foreign.read(path / "adapter_model.safetensors")


def test_untrained_states_are_passed_over_and_trained_ones_refused(made, tmp_path):
    tensors, want = made(BONE)
    states = {f"blocks.{i}.att.time_state": torch.zeros(4, 8, 8) for i in range(3)}
    torch.save(tensors | states, tmp_path / "early.pth")
    assert_merges(tmp_path, tmp_path / "early.pth", want)
    states["blocks.1.att.time_state"][0, 0, 0] = 1
    torch.save(tensors | states, tmp_path / "tuned.pth")
    with pytest.raises(
        InputError,
        match=r"time_state \(4, 8, 8\): a tuned state .* not merged; keep both .* chat --state",
    ):
        foreign.read(tmp_path / "tuned.pth")


@pytest.mark.parametrize(
    ("tensors", "known", "message"),
    [
        ({"blocks.0.att.key.lora_A": (2, 4)}, {}, "a LoRA's alpha is not in its file; say --alpha"),
        ({"blocks.0.att.key.disha": (2, 4)}, {"alpha": 8.0}, "--alpha 8: .* is no LoRA: it has none"),
        ({"blocks.0.ln1.weight": (4,)}, {}, "no tensor in it is an adapter's"),
        (
            {"blocks.0.att.key.disha": (2, 4), "blocks.0.att.value.disha": (3, 4)}, {},
            r"bone of ranks \[2, 3\]: must be of one method and rank",
        ),
        (
            {"blocks.0.att.key.disha": (2, 4), "blocks.0.att.value.lora_A": (2, 4)}, {"alpha": 1.0},
            "bone, lora of ranks",
        ),
    ],
)  # fmt: skip
def test_what_can_not_be_known_is_asked_for(tensors, known, message, tmp_path):
    torch.save({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        foreign.read(tmp_path / "x.pth", **known)


@pytest.mark.parametrize("config", [LORA, PISSA, BONE, BAT], ids=lambda config: config.kind)
def test_the_base_is_rounded_as_it_was_in_training_if_that_is_said(config, made, tmp_path):
    """RWKV-PEFT's --quant: what stays of a matrix is packed and unpacked before the adapter is added."""
    tensors, _ = made(config)
    torch.save({n: x for n, x in tensors.items() if "init" not in n}, tmp_path / "rwkv-0.pth")
    torch.save({n: x for n, x in tensors.items() if "init" in n}, tmp_path / "init.pth")
    known = {"lora": {"alpha": 7.5}, "pissa": {"init": tmp_path / "init.pth"}}.get(config.kind, {})
    receipt = merge(
        tmp_path / "base.pth", [Part(tmp_path / "rwkv-0.pth", quantize="nf4", **known)], tmp_path / "merged.pth"
    )
    assert receipt["adapters"][0]["quantize"] == "nf4"
    base, found = checkpoint.read(tmp_path / "base.pth"), checkpoint.read(tmp_path / "merged.pth")
    name = "blocks.1.ffn.key"
    weight, p = (
        base[f"{name}.weight"],
        {n.rpartition(".")[2]: x for n, x in tensors.items() if n.startswith(f"{name}.")},
    )
    match config.kind:
        case "lora":
            want = rounded(weight, "nf4") + 7.5 / 3 * p["lora_B"] @ p["lora_A"]
        case "pissa":
            left = weight - p["init_lora_B"] @ p["init_lora_A"]
            want = rounded(left, "nf4") + p["lora_B"] @ p["lora_A"]
        case "bone":
            want = rounded(weight, "nf4") + p["disha"].T.repeat(1, 7)[:, :32]
        case _:
            want = rounded(weight, "nf4").clone()
            for a, b in itertools.product(range(16), range(4)):
                block = (slice(8 * a, 8 * a + 8), slice(8 * b, 8 * b + 8))
                want[block] += want[block] @ p["disha"][b] + p["disha"][b]
    torch.testing.assert_close(found[f"{name}.weight"], want)
    part = Part(tmp_path / "rwkv-0.pth", weight=0.5, quantize="nf4", **known)
    with pytest.raises(InputError, match="--quantize nf4: a base is rounded for one whole adapter; leave it out"):
        merge(tmp_path / "base.pth", [part], tmp_path / "half.pth")
