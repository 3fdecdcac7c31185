"""A run goes on from an adapter: as if it had never been put down."""

import json
import zipfile

import pytest
import torch
from methods import EXAMPLES, OTHERS, begun, train
from safetensors.torch import save_file

from rwkv_core import checkpoint, models, warm_start
from rwkv_core.adapters import attach, file, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.config import FullConfig, LoraConfig, PissaConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.merge import Part, merge

LORA, PISSA, BONE = EXAMPLES[:3]
every_setting = pytest.mark.parametrize("config", EXAMPLES + OTHERS, ids=lambda c: f"{c.kind}-{c.layers}")
TOKENS = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base(tiny, tmp_path):
    checkpoint.write(tmp_path / "base.pth", tiny.state_dict())
    return tmp_path / "base.pth"


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS)[0]


def save(path, base, config, model, quantize="none"):
    about = {"format": 1, "adapter": config, "base_sha256": sha256(base), "data_sha256": "", "vocabulary_sha256": ""}
    file.write(path, trained_state(model), AdapterRecord(**about, quantize=quantize, run="r"))
    return path


@pytest.fixture
def trained(base, tmp_path):
    """A model that has learned something by that method, and its adapter."""

    def make(config, **how):
        model = models.load(base, **how)
        attach(model, config, seed=0, originals=checkpoint.read(base))
        train(model, TOKENS, 3)
        return model, save(tmp_path / "one.pth", base, config, model, how.get("quantize", "none"))

    return make


def go_on(base, config, path, seed=1, init=None, **how):
    """A model of its own, attached from the file; another seed, so that nothing of it is drawn anew."""
    config = config.model_copy(update={"load": path} | ({"load_init": init} if init else {}))
    model = models.load(base, **how)
    start = warm_start.read(config, base, sha256(base), how.get("quantize", "none"))
    attach(model, config, seed, originals=checkpoint.read(base), start=start)
    return model


@pytest.mark.parametrize(
    ("config", "how"),
    [
        (c, how)
        for c in EXAMPLES + OTHERS
        for how in ({}, {"dtype": torch.bfloat16}, {"quantize": "nf4-double"})
        if c.kind != "full" or "quantize" not in how  # it would train what is packed
    ],
    ids=lambda x: f"{x.kind}-{x.layers}" if hasattr(x, "kind") else str(x),
)
def test_it_computes_what_the_other_did_to_the_bit(config, how, base, trained):
    model, path = trained(config, **how)
    other = go_on(base, config, path, **how)
    assert torch.equal(logits(other), logits(model))
    want, found = model.state_dict(), other.state_dict()
    assert list(found) == list(want)
    assert all(torch.equal(found[name], x) for name, x in want.items())
    frozen = [{name for name, p in m.named_parameters() if not p.requires_grad} for m in (model, other)]
    assert frozen[0] == frozen[1]


@every_setting
def test_it_learns_on_and_merges(config, base, trained, tmp_path):
    model, path = trained(config)
    other = go_on(base, config, path)
    before = logits(other)
    for each in (model, other):
        train(each, TOKENS, 3)
    assert torch.equal(logits(other), logits(model))
    assert (logits(other) - before).abs().max() > 0.01
    merge(base, [Part(save(tmp_path / "two.pth", base, config, other))], tmp_path / "merged.pth")
    merged, begin = begun(tmp_path / "merged.pth", len(TOKENS))
    with torch.no_grad():
        found = merged.eval()(TOKENS, begin)[0]
    torch.testing.assert_close(found, logits(other), rtol=1e-4, atol=1e-4)


def test_nothing_is_loaded_where_nothing_is_named(base):
    for config in EXAMPLES:
        assert warm_start.read(config, base, sha256(base), "none") is None
        assert not any(warm_start.digests(config).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, "adapter.rank = 4: .*one.pth was trained with 3; set the same"),
        ({"alpha": 1.0}, "adapter.alpha = 1.0: .* was trained with 7.5"),
        ({"dora": True}, "adapter.dora = True: .* was trained with False"),
        ({"rank_stabilized": True}, "adapter.rank_stabilized = True: .* was trained with False"),
    ],
)
def test_settings_that_give_the_values_another_meaning_are_refused(changes, message, base, trained):
    _, path = trained(LORA)
    with pytest.raises(InputError, match=message):
        go_on(base, LORA.model_copy(update=changes), path)


def test_a_base_kept_in_another_way_is_refused(base, trained):
    _, path = trained(LORA, quantize="nf4")
    for quantize in ("none", "int8"):
        with pytest.raises(
            InputError, match=f"model.quantize = {quantize}: .*one.pth was trained with nf4; set the same"
        ):
            go_on(base, LORA, path, quantize=quantize)


def test_another_method_is_refused(base, trained):
    _, path = trained(LORA)
    with pytest.raises(InputError, match=r"adapter.kind = bone: .* was trained with lora"):
        go_on(base, BONE, path)


def test_another_base_is_refused(base, trained, random_model, tmp_path):
    _, path = trained(LORA)
    checkpoint.write(tmp_path / "other.pth", random_model(seed=1).state_dict())
    with pytest.raises(InputError, match=f"was trained on another base .*{sha256(base)[:12]}"):
        go_on(tmp_path / "other.pth", LORA, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("att.receptance",)}, "it has blocks.0.att.value.lora_A, .* and 15 more: these settings do not"),
        ({"layers": "0-1"}, r"it has blocks.2.att.receptance.lora_A.*: these settings do not train it; set targets"),
        ({"targets": ("att.*", "ffn.*")}, "adapter.load: blocks.0.att.key: has nothing; it must be"),
        ({"also": ("ln_out.*",)}, "it lacks ln_out.bias, ln_out.weight: these settings train it"),
    ],
    ids=str,
)
def test_what_is_on_one_side_alone_is_named(changes, message, base, trained):
    _, path = trained(LORA)
    with pytest.raises(InputError, match=message):
        go_on(base, LORA.model_copy(update=changes), path)


@pytest.mark.parametrize(
    "config", [LORA, FullConfig(kind="full", layers="all", also=("ln_out.*",), state="none", load=None)]
)
def test_values_of_another_shape_are_refused(config, base, trained):
    _, path = trained(config)
    tensors, record = file.read(path)
    name = next(reversed(tensors))
    file.write(path, tensors | {name: tensors[name][1:]}, record)
    with pytest.raises(InputError, match=rf"adapter.load: {name.removesuffix('.lora_B')}.* it must be"):
        go_on(base, config, path)


def test_a_file_that_is_not_there(base, tmp_path):
    with pytest.raises(InputError, match=r"adapter.load = .*none.pth: there is no such file"):
        go_on(base, LORA, tmp_path / "none.pth")


@pytest.mark.parametrize("config", [LORA, PISSA, BONE, OTHERS[0]], ids=lambda c: f"{c.kind}-{c.layers}")
def test_it_takes_what_rwkv_peft_wrote(config, base, trained, tmp_path):
    model, path = trained(config)
    tensors, _ = file.read(path)
    init = None
    torch.save({f"model.{n}": x for n, x in tensors.items() if "init" not in n}, tmp_path / "rwkv-0.pth")
    if config.kind == "pissa":
        init = tmp_path / "init_pissa.pth"
        torch.save({f"model.{n}": x for n, x in tensors.items() if "init" in n}, init)
    assert torch.equal(logits(go_on(base, config, tmp_path / "rwkv-0.pth", init=init)), logits(model))


def test_it_takes_a_folder_of_hugging_face(base, trained, tmp_path):
    model, path = trained(LORA)
    folder = tmp_path / "hf"
    folder.mkdir()
    tensors, _ = file.read(path)
    save_file({f"base_model.model.{n}.weight": x for n, x in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 7.5}))
    assert torch.equal(logits(go_on(base, LORA, folder)), logits(model))
    with pytest.raises(InputError, match=r"adapter.alpha = 8.0: .* was trained with 7.5"):
        go_on(base, LORA.model_copy(update={"alpha": 8.0}), folder)


def test_a_pissa_without_what_was_taken_out_is_not_taken_for_one(base, trained, tmp_path):
    """RWKV-PEFT went on without the matrix's principal part."""
    _, path = trained(PISSA)
    tensors, _ = file.read(path)
    torch.save({n: x for n, x in tensors.items() if "init" not in n}, tmp_path / "rwkv-0.pth")
    with pytest.raises(InputError, match=r"load_init is null: .* does not tell what was taken out"):
        go_on(base, PISSA, tmp_path / "rwkv-0.pth")


def test_an_init_that_would_not_be_read_is_refused(base, trained, tmp_path):
    _, path = trained(PISSA)
    with pytest.raises(InputError, match="has all of it in it; set it to null"):
        go_on(base, PISSA, path, init=path)
    alone = PissaConfig(**PISSA.model_dump() | {"load_init": path})
    with pytest.raises(InputError, match=r"it belongs to adapter.load, which is null"):
        warm_start.read(alone, base, sha256(base), "none")


def test_a_record_from_before_there_was_load_is_read(base, trained):
    _, path = trained(LORA)
    with zipfile.ZipFile(path) as archive:
        [entry] = [name for name in archive.namelist() if name.endswith("rwkv-flow.json")]
        values = json.loads(archive.read(entry))
        others = [(info, archive.read(info)) for info in archive.infolist() if info.filename != entry]
    del values["adapter"]["load"], values["loaded"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for info, data in others:
            archive.writestr(info, data)
        archive.writestr(entry, json.dumps(values))
    record = file.read_record(path)
    assert record.adapter == LORA
    assert isinstance(record.adapter, LoraConfig)
    assert record.loaded is None
