"""Methods of Hugging Face's peft: each that is not refused by name is its merged matrix, and its file tells all of it."""

import importlib.util
import os
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from methods import PEFT, SOME, train
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from rwkv_core import checkpoint, models, warm_start
from rwkv_core.adapters import attach, file, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.adapters.peft import REFUSED, part_name, settings
from rwkv_core.config import LoraConfig, PeftConfig
from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import sha256
from rwkv_core.merge import Part, merge

TOKENS = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))
SHIFTS = {"C3A", "DEFT", "HRA"}
"""Whose own initial values change the function, or round."""

every_config = pytest.mark.parametrize("values", PEFT, ids=lambda v: " ".join(map(str, v.values())))


def config(values, **changes):
    return PeftConfig(kind="peft", config=values, **(SOME | changes))


@pytest.fixture
def base(tiny, tmp_path):
    checkpoint.write(tmp_path / "base.pth", tiny.state_dict())
    return tmp_path / "base.pth"


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS)[0]


def save(path, base, settings, model):
    about = {"format": 1, "adapter": settings, "base_sha256": sha256(base), "data_sha256": "", "vocabulary_sha256": ""}
    file.write(path, trained_state(model), AdapterRecord(**about, run="r"))
    return path


def test_every_method_works_or_is_refused_by_name():
    known = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert {values["peft_type"] for values in PEFT} | REFUSED.keys() == known
    assert not {values["peft_type"] for values in PEFT} & REFUSED.keys()


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_merges_and_is_gone_on_from(values, dtype, base, tmp_path):
    model = models.load(base, dtype=dtype)
    before, names = logits(model), set(model.state_dict())
    attach(model, config(values), seed=0)
    new = logits(model)
    assert new.dtype == dtype
    if values["peft_type"] not in SHIFTS:
        assert torch.equal(new, before)
    assert names <= set(model.state_dict())  # the checkpoint's names still hold
    frozen = {name: x.clone() for name, x in model.state_dict().items() if name in names}
    start = {name: x.clone() for name, x in trained_state(model).items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        train(model, TOKENS, 3, 0.02)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in frozen.items())
    learned = trained_state(model)
    assert {x.dtype for x in learned.values() if x.is_floating_point()} == {torch.float32}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert not torch.equal(learned[name], start[name]), name
    want = logits(model)
    assert (want - new).abs().max() > 0.01
    path = save(tmp_path / "one.pth", base, config(values), model)
    receipt = merge(base, [Part(path)], tmp_path / "merged.pth")
    assert receipt["merged"]["matrices_changed"] == 3 * 4
    if dtype == torch.float32:
        torch.testing.assert_close(logits(models.load(tmp_path / "merged.pth")), want, rtol=1e-4, atol=2e-4)
    going_on = config(values, load=path)
    other = models.load(base, dtype=dtype)
    attach(other, going_on, 1, start=warm_start.read(going_on, base, sha256(base), "none"))
    assert torch.equal(logits(other), want)


def test_its_lora_is_ours(base):
    """The same values compute and learn the same."""
    ours = LoraConfig(kind="lora", rank=3, alpha=7.5, rank_stabilized=False, dropout=0.0, dora=False, **SOME)
    one, other = models.load(base), models.load(base)
    attach(one, ours, 0)
    attach(other, config(PEFT[0]), 1)
    assert [n for n, p in one.named_parameters() if p.requires_grad] == [
        n for n, p in other.named_parameters() if p.requires_grad
    ]
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        train(model, TOKENS, 3, 0.02)
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-4, atol=1e-4)
    assert (logits(one) - logits(models.load(base))).abs().max() > 0.1


@pytest.mark.parametrize(
    "values",
    [v for v in PEFT if v["peft_type"] in ("LORA", "MISS", "LOHA", "LOKR", "OFT", "IA3", "DELORA")],
    ids=lambda v: " ".join(map(str, v.values())),
)
def test_a_folder_that_peft_wrote_merges_to_what_peft_computes(values, base, tmp_path):
    about = dict(values)
    model = models.load(base)
    modules = ["att.receptance", "att.value", "ffn.key", "ffn.value"]
    if values["peft_type"] == "IA3":
        about["feedforward_modules"] = []
    theirs = PEFT_TYPE_TO_CONFIG_MAPPING[about.pop("peft_type")](target_modules=modules, **about)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, theirs)
        train(wrapped.base_model.model, TOKENS, 3, 0.02)
        wrapped.save_pretrained(tmp_path / "hf")
    want = logits(wrapped.base_model.model)
    assert (want - logits(models.load(base))).abs().max() > 0.01
    receipt = merge(base, [Part(tmp_path / "hf")], tmp_path / "merged.pth")
    torch.testing.assert_close(logits(models.load(tmp_path / "merged.pth")), want, rtol=1e-4, atol=1e-4)
    assert receipt["merged"]["matrices_changed"] == 3 * 4
    [entry] = receipt["adapters"]
    if entry["kind"] == "peft":
        assert entry["settings"]["config"] == settings(values)
        going_on = config(values, load=tmp_path / "hf")
        other = models.load(base)
        attach(other, going_on, 1, start=warm_start.read(going_on, base, sha256(base), "none"))
        torch.testing.assert_close(logits(other), want, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_in_training_alone(base):
    model = models.load(base)
    attach(model, config(PEFT[0] | {"lora_dropout": 0.5}), 0)
    train(model, TOKENS, 3, 0.02)
    assert torch.equal(logits(model), logits(model))
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_method_that_can_not_work_here_is_refused_by_name(kind, tiny):
    with pytest.raises(InputError, match=f"adapter.config.peft_type = {kind}: "):
        attach(tiny, config({"peft_type": kind}), 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 3}, "adapter.config.peft_type = None: peft has no such method; those that work here: BOFT, C3A"),
        ({"peft_type": "LOAH"}, "adapter.config.peft_type = LOAH: peft has no such method"),
        ({"peft_type": "LOHA", "rank": 3}, "adapter.config = .*unexpected keyword argument 'rank'.*documentation of LOHA"),
        ({"peft_type": "LOHA", "r": 0}, "adapter.config beside blocks.0.att.receptance: .*positive integer"),
        ({"peft_type": "BOFT", "boft_block_size": 7}, "adapter.config beside blocks.0.att.receptance: peft refuses a matrix"),
        ({"peft_type": "LOHA", "target_modules": ["key"]}, "adapter.config.target_modules = .*targets, layers and also say"),
        ({"peft_type": "LORA", "rank_pattern": {"key": 2}}, "adapter.config.rank_pattern = .* it is the same everywhere"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "its initial values change the matrix itself.*kind pissa"),
        ({"peft_type": "LORA", "init_lora_weights": "olora"}, "its initial values change the matrix itself"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_can_not_work_are_refused(values, message, tiny):
    with pytest.raises(InputError, match=message):
        attach(tiny, config(values), 0)


def test_other_settings_are_not_gone_on_from(base, tmp_path):
    model = models.load(base)
    attach(model, config(PEFT[2]), 0)
    path = save(tmp_path / "one.pth", base, config(PEFT[2]), model)
    with pytest.raises(InputError, match=r"adapter.config = .*'alpha': 7.*was trained with .*'alpha': 6"):
        warm_start.read(config(PEFT[2] | {"alpha": 7}, load=path), base, sha256(base), "none")
    same = config(PEFT[2] | {"module_dropout": 0.1, "use_effective_conv2d": False}, load=path)
    assert warm_start.read(same, base, sha256(base), "none") is not None


def test_names_in_files():
    assert part_name("lora_A.default.weight") == "lora_A"
    assert part_name("hada_w1_a.default") == "hada_w1_a"
    assert part_name("psoft_R.default.vector_b") == "psoft_R_vector_b"
    assert part_name("glora_A.Xd") == "glora_A_Xd"


def test_without_the_library_it_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        WorldError, match=r"peft: the package that has LOHA is missing; pip install 'rwkv-flow\[peft\]'"
    ):
        attach(tiny, config(PEFT[2]), 0)


def test_it_moves_with_the_model(base):
    """What the layer has beside its parameters, too."""
    model = models.load(base)
    attach(model, config({"peft_type": "OFT", "oft_block_size": 8}), 0)
    train(model, TOKENS, 3, 0.02)
    want = logits(model)
    model.double()
    torch.testing.assert_close(logits(model.float()), want)
    layer = model.blocks[0].att.receptance
    assert layer._layer[0].oft_R["default"].weight is layer.oft_R


def test_the_library_is_imported_where_it_is_used_alone():
    code = "import sys, rwkv_core.merge; print('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_environment_stays_as_it_was(tiny):
    """Where BOFT's own kernel can't be compiled, it leaves $CC and $CXX set, and every compiler after it is another."""
    before = dict(os.environ)
    attach(tiny, config({"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2}), 0)
    assert dict(os.environ) == before
