"""The contract of every adapter: a new one is added to EXAMPLES, and all of this holds for it."""

import json
import typing
import zipfile

import pytest
import torch
from methods import EXAMPLES, OTHERS, SOME, begun, train
from random_models import VERSIONS

from rwkv_core import checkpoint, models
from rwkv_core.adapters import METHODS, attach, file, is_matrix, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.config import AdapterConfig, BatConfig, BoneConfig, FullConfig, PissaConfig
from rwkv_core.errors import InputError
from rwkv_core.files import sha256
from rwkv_core.merge import Part, merge
from rwkv_core.quantize import Form, Packed

FORMS = [form for form in typing.get_args(Form) if form != "none"]
MATRICES = [c for c in EXAMPLES + OTHERS if c.kind in METHODS and c.targets == SOME["targets"]]

every_method = pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: config.kind)
every_adapter = pytest.mark.parametrize("config", MATRICES, ids=lambda config: config.kind)
every_setting = pytest.mark.parametrize("config", EXAMPLES + OTHERS, ids=lambda c: f"{c.kind}-{c.layers}-{c.state}")


def test_every_method_has_an_example():
    members = typing.get_args(typing.get_args(AdapterConfig)[0])
    assert {type(config) for config in EXAMPLES} == set(members)
    assert {config.kind for config in EXAMPLES} == {*METHODS, "full", "state"}


def assert_unchanged(logits, before, config):
    """PiSSA takes out of a matrix what it adds: that rounds."""
    if config.kind == "pissa":
        torch.testing.assert_close(logits, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits, before)


@pytest.fixture
def base(tiny, tmp_path):
    path = tmp_path / "base.pth"
    checkpoint.write(path, tiny.state_dict())
    return path


@pytest.fixture
def tokens():
    return torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(1))


def logits(model, tokens, state=None):
    with torch.no_grad():
        return model.eval()(tokens, state)[0]


def merged_logits(path, tokens):
    """Of a merged model; it begins from the state beside it, as much of that as there is."""
    model, begin = begun(path, len(tokens))
    return logits(model, tokens, begin)


def record(base, config, **changes):
    values = {"format": 1, "adapter": config, "base_sha256": sha256(base), "data_sha256": "d", "vocabulary_sha256": "v"}
    return AdapterRecord(**(values | {"run": "r"} | changes))


@every_setting
def test_a_new_adapter_changes_nothing(config, tiny, tokens):
    before = logits(tiny, tokens)
    assert bool(attach(tiny, config, seed=0)) == (config.kind in METHODS)
    assert_unchanged(logits(tiny, tokens), before, config)


@every_setting
def test_only_what_was_asked_for_is_trained(config, tiny, tokens):
    base = {name: x.clone() for name, x in tiny.state_dict().items()}
    attach(tiny, config, seed=0)
    before = {name: x.clone() for name, x in tiny.state_dict().items()}
    trained = {name for name, p in tiny.named_parameters() if p.requires_grad}
    assert trained
    train(tiny, tokens)
    after = tiny.state_dict()
    # a token that is not there leaves the embedding's row, and RWKV-7's first layer has no share of a value before it
    saved = trained_state(tiny)
    hold_rows = {f"{name.removesuffix('.rows')}.weight" for name in saved if name.endswith(".rows")}
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained | hold_rows
    assert saved.keys() == trained | (after.keys() - base.keys())
    # PiSSA's matrix is what is left of it, and the rows of tokens are in theirs
    residual = {f"{name.rpartition('.')[0]}.weight" for name in saved if "init_lora" in name or name.endswith(".rows")}
    assert all(torch.equal(after[name], x) for name, x in base.items() if name not in trained | residual)
    assert all(torch.equal(saved[name], after[name]) for name in saved)


@every_adapter
def test_its_initial_values_follow_the_seed(config, random_model):
    def values(seed):
        model = random_model()
        attach(model, config, seed)
        return trained_state(model)

    one, same, other = values(1), values(1), values(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = config.kind in ("lora", "pissa", "peft")
    assert drawn != all(torch.equal(one[name], other[name]) for name in one)


@every_setting
def test_merging_keeps_the_function(config, base, tokens, tmp_path):
    model = models.load(base)
    before, tiny_names = logits(model, tokens), set(model.state_dict())
    adapted = attach(model, config, seed=0)
    train(model, tokens)
    want = logits(model, tokens)
    assert (want - before).abs().max() > 0.1
    file.write(tmp_path / "adapter.pth", trained_state(model), record(base, config))
    receipt = merge(base, [Part(tmp_path / "adapter.pth")], tmp_path / "merged.pth")
    torch.testing.assert_close(merged_logits(tmp_path / "merged.pth", tokens), want, rtol=1e-4, atol=1e-4)
    files = {"none": [], "wkv": ["merged.state.pth"]}.get(
        config.state, ["merged.state.pth", "merged.state.rwkv-flow.pth"]
    )
    assert sorted(path.name for path in tmp_path.glob("merged.*")) == ["merged.pth", *files]
    assert receipt == {
        "base": {"path": str(base), "sha256": sha256(base)},
        "adapters": [
            {
                "path": str(tmp_path / "adapter.pth"), "sha256": sha256(tmp_path / "adapter.pth"), "kind": config.kind,
                "run": "r", "base_checked": True, "weight": 1.0, "settings": config.model_dump(mode="json"),
                "quantize": "none",
            }
        ],
        "layers": "all",
        "merged": {
            "sha256": sha256(tmp_path / "merged.pth"), "bytes": (tmp_path / "merged.pth").stat().st_size,
            "matrices_changed": len(adapted),
            "tensors_replaced": sum(name in tiny_names or name.endswith(".rows") for name in trained_state(model)),
        },
        "states": {
            name: {"sha256": sha256(tmp_path / name), "bytes": (tmp_path / name).stat().st_size} for name in files
        },
    }  # fmt: skip


@every_setting
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_takes_it(version, config, random_model, tokens, tmp_path):
    """Attached it changes nothing, it learns, and merging keeps the function. RWKV-4 has no state to tune."""
    if version == "4" and config.state != "none":
        with pytest.raises(InputError, match=f"adapter.state = {config.state}: RWKV-4 has no matrix for a state; set"):
            attach(random_model(version=version), config, seed=0)
        return
    base = tmp_path / "base.pth"
    checkpoint.write(base, random_model(version=version).state_dict())
    model = models.load(base)
    before = logits(model, tokens)
    attach(model, config, seed=0)
    assert_unchanged(logits(model, tokens), before, config)
    train(model, tokens)
    want = logits(model, tokens)
    assert (want - before).abs().max() > 0.1
    file.write(tmp_path / "adapter.pth", trained_state(model), record(base, config))
    merge(base, [Part(tmp_path / "adapter.pth")], tmp_path / "merged.pth")
    torch.testing.assert_close(merged_logits(tmp_path / "merged.pth", tokens), want, rtol=1e-4, atol=1e-4)


def every_pair():
    """Of method and form, of method and version, and of version and form: all three together are 252."""
    for i, form in enumerate(FORMS):
        for j, config in enumerate(MATRICES):
            yield pytest.param(VERSIONS[(i + j) % len(VERSIONS)], form, config, id=f"{config.kind}-{form}-{j}")


def test_every_pair_is_among_the_cases():
    cases = [case.values for case in every_pair()]
    assert {(form, config.kind) for _, form, config in cases} == {(f, c.kind) for f in FORMS for c in MATRICES}
    assert {(version, form) for version, form, _ in cases} == {(v, f) for v in VERSIONS for f in FORMS}
    assert len({(version, id(config)) for version, _, config in cases}) == len(VERSIONS) * len(MATRICES)


@pytest.mark.parametrize(("version", "form", "config"), list(every_pair()))
def test_every_method_works_beside_packed_matrices(version, form, config, random_model, tokens, tmp_path):
    """Attached it changes nothing, it learns, and merged into the base as it was rounded it computes the same."""
    base = tmp_path / "base.pth"
    checkpoint.write(base, random_model(version=version).state_dict())
    model = models.load(base, quantize=form)
    before, originals = logits(model, tokens), checkpoint.read(base)
    adapted = attach(model, config, seed=0, originals=originals)
    frozen = {name: x.clone() for name, x in model.state_dict().items() if ".weight." in name}
    if config.kind != "pissa":  # which rounds what is left of a matrix, and so to another result
        assert torch.equal(logits(model, tokens), before)
    for name in adapted if config.kind == "pissa" else ():
        layer = model.get_submodule(name)
        left = originals[f"{name}.weight"] - layer.init_lora_B @ layer.init_lora_A
        assert error(layer.weight.unpacked(), left) <= 1.001 * error(Packed(left, form).unpacked(), left)
    train(model, tokens)
    want = logits(model, tokens)
    assert (want - before).abs().max() > 0.1
    assert all(torch.equal(model.state_dict()[name], x) for name, x in frozen.items())
    file.write(tmp_path / "adapter.pth", trained_state(model), record(base, config, quantize=form))
    receipt = merge(base, [Part(tmp_path / "adapter.pth")], tmp_path / "merged.pth")
    assert receipt["adapters"][0]["quantize"] == form
    merged = checkpoint.read(tmp_path / "merged.pth")
    torch.testing.assert_close(logits(models.load(tmp_path / "merged.pth"), tokens), want, rtol=1e-4, atol=1e-4)
    merge(base, [Part(tmp_path / "adapter.pth", quantize="none")], tmp_path / "exact.pth")
    exact = checkpoint.read(tmp_path / "exact.pth")
    for name, x in originals.items():
        if name.removesuffix(".weight") not in adapted:
            assert torch.equal(exact[name], x)
            assert torch.equal(merged[name], Packed(x, form).unpacked() if is_matrix(name, x) else x)
        elif config.kind != "bat":  # whose change is a function of the matrix
            rounding = error(merged[name], exact[name]) * exact[name].norm() / x.norm()
            assert 0 < rounding <= 1.2 * error(Packed(x, form).unpacked(), x)


def error(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("also", [("att.value.weight",), ("*",)])
def test_what_is_packed_is_not_trained_itself(also, base):
    model = models.load(base, quantize="nf4")
    config = FullConfig(kind="full", layers="all", also=also, state="none", load=None)
    with pytest.raises(
        InputError, match=r"adapter.also has blocks.0.att.*: model.quantize packs that matrix; adapt it"
    ):
        attach(model, config, seed=0)
    attach(model, FullConfig(kind="full", layers="all", also=("ln*", "emb.weight"), state="none", load=None), seed=0)
    assert {name for name in trained_state(model) if "ln" not in name} == {"emb.weight"}


@every_adapter
def test_a_merged_file_is_like_its_base(config, base, tokens, tmp_path):
    """A bfloat16 base: keys, order, shapes and precision are kept, and what was not adapted has the same bits."""
    half = tmp_path / "half.pth"
    checkpoint.write(half, checkpoint.read(base), "bf16")
    model = models.load(half, dtype=torch.float32)
    adapted = attach(model, config, seed=0)
    train(model, tokens)
    file.write(tmp_path / "adapter.pth", trained_state(model), record(half, config))
    merge(half, [Part(tmp_path / "adapter.pth")], tmp_path / "merged.pth")
    one, two = checkpoint.read(half), checkpoint.read(tmp_path / "merged.pth")
    assert [(n, x.shape, x.dtype) for n, x in two.items()] == [(n, x.shape, x.dtype) for n, x in one.items()]
    changed = [name for name in one if not torch.equal(one[name], two[name])]
    assert changed == [f"{name}.weight" for name in adapted]
    assert half.stat().st_size == (tmp_path / "merged.pth").stat().st_size


@every_setting
def test_works_beside_a_base_in_bfloat16(config, base, tokens):
    model = models.load(base, dtype=torch.bfloat16)
    before = logits(model, tokens)
    attach(model, config, seed=0)
    if config.kind == "pissa" or any(pattern in ("*", "emb.weight") for pattern in config.also):
        # PiSSA rounds; and an embedding in float32 leaves all that is added to it in float32
        torch.testing.assert_close(logits(model, tokens), before, rtol=0.1, atol=0.1, check_dtype=False)
    else:
        assert torch.equal(logits(model, tokens), before)
        train(model, tokens)
        assert logits(model, tokens).dtype == torch.bfloat16
    assert {x.dtype for n, x in trained_state(model).items() if not n.endswith(".rows")} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        train(model, tokens)
        assert logits(model, tokens).dtype == torch.bfloat16


@every_adapter
@pytest.mark.parametrize("target", ["att.vlaue", "key", "att", "head", "blocks.0.att.key", "ffn.receptance"])
def test_a_target_that_matches_nothing_is_refused(config, target, tiny):
    config = config.model_copy(update={"targets": ("att.key", target)})
    with pytest.raises(
        InputError, match=rf"adapter.targets has '{target}': .*; there are att.key, att.output, att.rec"
    ):
        attach(tiny, config, seed=0)


@every_adapter
@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (("att.key",), ["att.key"]),
        (("att.*",), ["att.receptance", "att.key", "att.value", "att.output"]),
        (("ffn.value", "att.o*"), ["att.output", "ffn.value"]),
        (("*.value", "att.value"), ["att.value", "ffn.value"]),
    ],
)
def test_targets(config, targets, chosen, tiny):
    adapted = attach(tiny, config.model_copy(update={"targets": targets}), seed=0)
    assert adapted == [f"blocks.{i}.{name}" for i in range(3) for name in chosen]
    assert {name.rsplit(".", 1)[0] for name in trained_state(tiny)} == set(adapted)


@every_method
def test_file_round_trip(config, base, tiny, tokens, tmp_path):
    attach(tiny, config, seed=0)
    train(tiny, tokens)
    wanted, about = trained_state(tiny), record(base, config)
    file.write(tmp_path / "adapter.pth", wanted, about)
    tensors, read = file.read(tmp_path / "adapter.pth")
    assert read == about
    assert list(tensors) == list(wanted)
    assert all(torch.equal(tensors[name], x) for name, x in wanted.items())
    file.write(tmp_path / "again.pth", {name: x.clone() for name, x in wanted.items()}, about)
    assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "adapter.pth").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.pth", "again.pth", "base.pth"]


def test_other_tools_see_their_own_keys_alone(base, tiny, tmp_path):
    """RWKV-PEFT's merge copies every key that it does not know into the model."""
    [config] = [c for c in EXAMPLES if c.kind == "lora"]
    adapted = attach(tiny, config, seed=0)
    file.write(tmp_path / "adapter.pth", trained_state(tiny), record(base, config))
    seen = torch.load(tmp_path / "adapter.pth", weights_only=True)
    assert list(seen) == [f"{name}.{part}" for name in adapted for part in ("lora_A", "lora_B")]
    for name in adapted:
        rows, columns = tiny.state_dict()[f"{name}.weight"].shape
        assert seen[f"{name}.lora_A"].shape == (3, columns)
        assert seen[f"{name}.lora_B"].shape == (rows, 3)
    with zipfile.ZipFile(tmp_path / "adapter.pth") as archive:
        assert archive.testzip() is None


@pytest.fixture
def adapter(base, tiny, tokens, tmp_path):
    attach(tiny, EXAMPLES[0], seed=0)
    train(tiny, tokens)
    file.write(tmp_path / "adapter.pth", trained_state(tiny), record(base, EXAMPLES[0]))
    return tmp_path / "adapter.pth"


def refuse_merge(base, adapter, message):
    out = adapter.with_name("merged.pth")
    with pytest.raises(InputError, match=message):
        merge(base, [Part(adapter)], out)
    assert not out.exists()


@pytest.fixture
def two(base, tokens, tmp_path):
    """Two adapters of the base, a LoRA with norms and a Bone, and what each merges to alone."""
    files, alone = [], []
    for config in (OTHERS[0].model_copy(update={"layers": "all"}), EXAMPLES[2]):
        model = models.load(base)
        attach(model, config, seed=0)
        train(model, tokens)
        files.append(tmp_path / f"{config.kind}.pth")
        file.write(files[-1], trained_state(model), record(base, config))
        merge(base, [Part(files[-1])], tmp_path / "alone.pth")
        alone.append(checkpoint.read(tmp_path / "alone.pth"))
    return files, alone


def test_several_adapters_are_added_by_weight(base, two, tmp_path):
    (one, other), alone = two
    receipt = merge(base, [Part(one, 0.25), Part(other, 1.5)], tmp_path / "merged.pth")
    start, found = checkpoint.read(base), checkpoint.read(tmp_path / "merged.pth")
    for name, x in start.items():
        want = x + 0.25 * (alone[0][name] - x) + 1.5 * (alone[1][name] - x)
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6)
    assert [entry["weight"] for entry in receipt["adapters"]] == [0.25, 1.5]
    assert [entry["kind"] for entry in receipt["adapters"]] == ["lora", "bone"]


def test_layers_take_part_as_much_as_is_said(base, two, tmp_path):
    (one, _), (alone, _) = two
    merge(base, [Part(one)], tmp_path / "merged.pth", layers="0.2*1-2 2")
    start, found = checkpoint.read(base), checkpoint.read(tmp_path / "merged.pth")
    for name, x in start.items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        whole = ".ln" in name or layer is None  # replaced, not scaled
        factor = {None: 1.0, 0: 0.0, 1: 1.0 if whole else 0.2, 2: 1.0}[layer]
        if factor in (0.0, 1.0):
            assert torch.equal(found[name], alone[name] if factor else x), name
        else:
            torch.testing.assert_close(found[name], x + factor * (alone[name] - x), rtol=1e-5, atol=1e-6)


def test_states_are_added_by_weight_and_left_out_by_block(base, tokens, tmp_path):
    """In all blocks there is a state; one that takes no part has the zeros that it began from."""
    files, states = [], []
    for config, seed in ((OTHERS[1], 1), (OTHERS[2], 2)):
        model = models.load(base)
        attach(model, config, seed=0)
        train(model, torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(seed)))
        files.append(tmp_path / f"{seed}.pth")
        file.write(files[-1], trained_state(model), record(base, config))
        states.append(trained_state(model))
    merge(base, [Part(files[0], 0.5), Part(files[1], -1.0)], tmp_path / "merged.pth", layers="0.3*0 2")
    found = checkpoint.read(tmp_path / "merged.state.rwkv-flow.pth")
    assert len(found) == 9
    for name, x in found.items():
        want = 0.5 * states[0].get(name, torch.zeros_like(x)) - states[1][name]
        assert x.any() == (".1." not in name)
        torch.testing.assert_close(x, want if ".1." not in name else 0 * x)
    clients = checkpoint.read(tmp_path / "merged.state.pth")
    assert list(clients) == [f"blocks.{i}.att.time_state" for i in range(3)]
    assert all(torch.equal(x, found[name]) for name, x in clients.items())


def test_a_state_is_of_all_blocks_whatever_layers_says(tiny):
    config = next(x for x in OTHERS if x.kind == "lora" and x.state != "none")
    assert config.layers == "0"
    attach(tiny, config, seed=0)
    names = set(trained_state(tiny))
    parts = ("att.time_state", "att.ts_state", "ffn.ts_state")
    assert {f"blocks.{i}.{part}" for i in range(3) for part in parts} < names
    assert not any(name.startswith(("blocks.1", "blocks.2")) for name in names if not name.endswith(parts))


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("blocks.1.att.time_state", lambda x: x[:1], r"is \(1, 8, 8\); it must be \(4, 8, 8\)"),
        ("blocks.1.att.time_state", lambda x: x.flatten(), r"is \(256,\); it must be \(4, 8, 8\)"),
        ("blocks.2.ffn.ts_state", lambda x: x[1:], r"is \(31,\); it must be \(32,\)"),
        ("blocks.0.att.ts_state", None, "its settings say that it was trained, and it is not there"),
    ],
)
def test_merge_refuses_a_state_that_does_not_fit(part, damage, message, base, tiny, tmp_path):
    attach(tiny, OTHERS[-1], seed=0)
    tensors = {name: x for name, x in trained_state(tiny).items() if name != part or damage}
    if damage:
        tensors[part] = damage(tensors[part]).contiguous()
    file.write(tmp_path / "adapter.pth", tensors, record(base, OTHERS[-1]))
    refuse_merge(base, tmp_path / "adapter.pth", f"{part}: does not fit the base: {message}")
    assert not list(tmp_path.glob("merged*"))


def test_a_record_of_before_states_is_read(base, adapter, tmp_path):
    """It does not say that it has none."""
    [entry] = [name for name in zipfile.ZipFile(adapter).namelist() if name.endswith("rwkv-flow.json")]
    values = json.loads(zipfile.ZipFile(adapter).read(entry))
    assert values["adapter"].pop("state") == "none"
    torch.save(torch.load(adapter), tmp_path / "archive.pth")  # its tensors lie in a folder of the file's name
    with zipfile.ZipFile(tmp_path / "archive.pth", "a") as archive:
        archive.writestr(entry, json.dumps(values))
    assert file.read_record(tmp_path / "archive.pth") == file.read_record(adapter)


@pytest.mark.parametrize("layers", ["3", "0.2*0-3", "x", "0.2*", "*1", "2-1"])
def test_layers_that_can_not_be_merged_are_refused(layers, base, adapter, tmp_path):
    with pytest.raises(InputError, match=r"layers has .*: the model's layers are 0 to 2"):
        merge(base, [Part(adapter)], tmp_path / "merged.pth", layers=layers)
    assert not (tmp_path / "merged.pth").exists()


def test_merge_does_not_overwrite_what_it_reads(base, adapter):
    before = base.read_bytes(), adapter.read_bytes()
    for out in (base, adapter, base.parent / "." / base.name):
        with pytest.raises(InputError, match="it is read, and would be overwritten; name another file"):
            merge(base, [Part(adapter)], out)
    assert (base.read_bytes(), adapter.read_bytes()) == before
    adapter = adapter.rename(adapter.with_name("out.state.pth"))
    with pytest.raises(InputError, match=r"out\.state\.pth: it is read, and would be overwritten; name another file"):
        merge(base, [Part(adapter)], adapter.with_name("out.pth"))
    assert (base.read_bytes(), adapter.read_bytes()) == before


def test_merge_refuses_another_base(base, adapter, random_model, tmp_path):
    other = tmp_path / "other.pth"
    checkpoint.write(other, random_model(seed=1).state_dict())
    refuse_merge(
        other, adapter, rf"other.pth \(sha256 {sha256(other)[:12]}.*trained on another base .*{sha256(base)[:12]}"
    )


def test_merge_asks_for_what_an_adapter_without_a_record_does_not_tell(base, adapter, tmp_path):
    torch.save(torch.load(adapter), tmp_path / "plain.pth")
    refuse_merge(base, tmp_path / "plain.pth", "plain.pth: a LoRA's alpha is not in its file; say --alpha")
    torch.save(torch.load(adapter), tmp_path / "older.pth", _use_new_zipfile_serialization=False)
    refuse_merge(base, tmp_path / "older.pth", "older.pth: a LoRA's alpha is not in its file; say --alpha")
    with pytest.raises(InputError, match="its alpha and all else are in its record; leave --alpha"):
        merge(base, [Part(adapter, alpha=3.0)], tmp_path / "merged.pth")


def test_merge_refuses_an_adapter_cut_short(base, adapter, tmp_path):
    data = adapter.read_bytes()
    for length in {*range(0, len(data), len(data) // 30), len(data) - 1, len(data) - 30}:
        (tmp_path / "short.pth").write_bytes(data[:length])
        refuse_merge(base, tmp_path / "short.pth", "cut short or no .pth")


@pytest.mark.parametrize("change", [{"format": 2}, {"adapter": {"kind": "other"}}, {"base_sha256": None}, {"more": 1}])
def test_merge_refuses_a_record_of_another_version(change, base, adapter, tmp_path):
    [entry] = [name for name in zipfile.ZipFile(adapter).namelist() if name.endswith("rwkv-flow.json")]
    values = json.loads(zipfile.ZipFile(adapter).read(entry)) | change
    torch.save(torch.load(adapter), tmp_path / "archive.pth")  # its tensors lie in a folder of the file's name
    with zipfile.ZipFile(tmp_path / "archive.pth", "a") as archive:
        archive.writestr(entry, json.dumps(values))
    refuse_merge(base, tmp_path / "archive.pth", "is of another version .*; train the adapter anew")


def test_merge_refuses_an_adapter_of_more_layers(base, tokens, random_model, tmp_path):
    model = random_model(n_layer=4)
    attach(model, EXAMPLES[0], seed=0)
    file.write(tmp_path / "adapter.pth", trained_state(model), record(base, EXAMPLES[0]))
    refuse_merge(
        base,
        tmp_path / "adapter.pth",
        "blocks.3.att.receptance.lora_A: does not fit the base: the base has no such tensor",
    )


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_merge_refuses_an_adapter_with_a_part_that_does_not_fit(part, damage, base, adapter):
    tensors, its_record = file.read(adapter)
    name = next(name for name in tensors if name.endswith(part))
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][1:, 1:]
    file.write(adapter, tensors, its_record)
    refuse_merge(base, adapter, "does not fit the base: .*; train the adapter anew")


@pytest.mark.parametrize("layers", ["3", "0-3", "2 7", "1-0"])
def test_layers_that_are_not_there_are_refused(layers, tiny):
    config = EXAMPLES[0].model_copy(update={"layers": layers})
    with pytest.raises(
        InputError, match=r"adapter.layers has .*: the model's layers are 0 to 2; name some of these as in"
    ):
        attach(tiny, config, seed=0)


def test_layers_chosen(tiny):
    config = EXAMPLES[0].model_copy(update={"layers": "2 0", "targets": ("att.key",), "also": ("ln2.*", "ln_out.bias")})
    assert attach(tiny, config, seed=0) == ["blocks.0.att.key", "blocks.2.att.key"]
    plain = {name for name in trained_state(tiny) if "lora" not in name}
    assert plain == {"ln_out.bias", *(f"blocks.{i}.ln2.{part}" for i in (0, 2) for part in ("weight", "bias"))}


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("ln9.*", r"adapter.also has 'ln9\.\*': each must match a parameter of adapter.layers; there are att"),
        ("time", "adapter.also has 'time'"),
        ("att.value.weight", r"adapter.also has blocks.0.att.value.weight: that matrix is adapted; leave it to"),
    ],
)
def test_parameters_that_can_not_be_trained_are_refused(also, message, tiny):
    with pytest.raises(InputError, match=message):
        attach(tiny, EXAMPLES[0].model_copy(update={"also": (also,)}), seed=0)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (BoneConfig(kind="bone", rank=33, **SOME), "the rank must be at most the 32 inputs"),
        (BatConfig(kind="bat", rank=12, **SOME), "the rank must divide the 32 inputs and 32 outputs"),
        (PissaConfig(kind="pissa", rank=33, iterations=2, load_init=None, **SOME), "the rank must be at most 32"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_rank_that_does_not_fit_is_refused(config, rule, tiny):
    with pytest.raises(InputError, match=f"adapter.rank beside blocks.0.att.receptance: {rule}"):
        attach(tiny, config, seed=0)


@every_method
def test_merge_refuses_an_adapter_that_lacks_something(config, base, tiny, tmp_path):
    attach(tiny, config, seed=0)
    tensors = trained_state(tiny)
    gone = next(iter(tensors)).rsplit(".", 1)[0] if config.kind in METHODS else next(iter(tensors))
    tensors = {name: x for name, x in tensors.items() if not name.startswith(gone)}
    file.write(tmp_path / "adapter.pth", tensors, record(base, config))
    refuse_merge(
        base,
        tmp_path / "adapter.pth",
        rf"{gone}: does not fit the base: (has nothing|its settings say)",
    )


@every_setting
def test_matrices_decay_and_vectors_do_not(config, tiny):
    attach(tiny, config, seed=0)
    names = {id(p): name for name, p in tiny.named_parameters()}
    groups = tiny.parameter_groups(1e-3, 0.1)
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    plain = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    trained = {name for name, p in tiny.named_parameters() if p.requires_grad}
    assert decayed | plain == trained
    assert not decayed & plain
    parts = ("lora_A", "lora_B", "disha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    assert all(name.endswith((".weight", *parts)) for name in decayed)
    of_tokens = {"emb.weight", "emb.values", "head.values"} if config.also != ("*",) else set()
    assert not decayed & of_tokens  # AdamW would move rows of tokens that never occur
    assert not any(name.endswith(parts) or ("ln" not in name and ".weight" in name) for name in plain - of_tokens)
