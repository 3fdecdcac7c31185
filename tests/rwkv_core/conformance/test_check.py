"""Real models, through every format, to the clients; and faults of every kind, each of which is found."""

import re

import conformed
import pytest
import torch

from rwkv_core import checkpoint
from rwkv_core.conformance import child, gguf_file
from rwkv_core.conformance.check import Expected, Subject, check
from rwkv_core.conformance.report import conforms, faults
from rwkv_core.formats import gguf
from rwkv_core.formats import web_rwkv as ours
from rwkv_core.tokenizer import world


def found(checked) -> str:
    return "\n".join(said for one in checked for said in faults(one))


def bfloat16(made) -> dict[str, torch.Tensor]:
    return {name: x.bfloat16() for name, x in made.state_dict().items()}


@pytest.mark.parametrize("version", ["5.1", "7"])
def test_pth_st_and_states(version, tmp_path):
    """By the rwkv package where it reads the format, one version of each of its two ways; and all by a reference."""
    made, tuned = conformed.model(version), conformed.state(conformed.model(version))
    subjects = [Subject(conformed.write(tmp_path, made, form)) for form in ("pth", "st")]
    for form, subject in zip(("pth", "st"), tuple(subjects), strict=True):
        subjects.append(Subject(conformed.write_state(tmp_path, tuned, form), subject.path))
    checked = check(subjects, Expected(bfloat16(made), tuned))
    assert found(checked) == ""
    assert conforms(checked) == "pth (rwkv 0.8.32), st (reference), pth state (rwkv 0.8.32), st state (reference)"
    rows = [row for one in checked for row in one.logits]
    assert {row.prompt for row in rows} == {"ASCII", "Chinese", "code"}
    for row in rows:
        assert 0 < row.difference < row.allowed < 0.01, row
        assert row.same_top > 0.9, row
        assert row.decided > 0.5, row


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4", "5.0", "5.2", "6"])
def test_every_version(version, tmp_path):
    made = conformed.model(version, n_layer=3)
    forms = ["pth"] if version == "5.0" else ["pth", "st"]
    subjects = [Subject(conformed.write(tmp_path, made, form)) for form in forms]
    if version != "4":
        tuned = conformed.state(made)
        subjects += [
            Subject(conformed.write_state(tmp_path, tuned, f), s.path) for f, s in zip(forms, subjects, strict=True)
        ]
    checked = check(subjects, Expected(bfloat16(made), tuned if version != "4" else None))
    assert found(checked) == ""
    assert len(checked) == len(subjects)


@pytest.fixture(scope="module")
def large():
    """An RWKV-7 of World's tokens, and its tensors in bfloat16."""
    made = conformed.model("7", vocab_size=65536)
    return made, bfloat16(made)


def test_llama_cpp_reads_what_we_write(large, tmp_path):
    """Its logits, its bytes of every token, and its tokens of three texts."""
    pytest.importorskip("llama_cpp")
    made, tensors = large
    subjects = [Subject(conformed.write(tmp_path, made, form)) for form in ("f16", "q8_0")]
    checked = check(subjects, Expected(tensors))
    assert found(checked) == ""
    for one in checked:
        assert one.reader.startswith("llama.cpp ")
        assert {row.reader for row in one.logits} == {"reference", one.reader}
        assert "tokens, as llama.cpp prints them" in {finding.what for finding in one.findings}
    exact, quantized = (max(r.allowed for r in one.logits if r.reader == one.reader) for one in checked)
    assert exact < 0.05 < quantized


@pytest.mark.slow
@pytest.mark.parametrize("version", ["6", "7"])
def test_every_gguf(version, tmp_path):
    """An RWKV-6 of 7 blocks is rescaled once, in those files that are."""
    made = conformed.model(version, n_layer=7, vocab_size=65536)
    subjects = [Subject(conformed.write(tmp_path, made, form)) for form in ("f32", "f16", "bf16", "q8_0")]
    assert found(check(subjects, Expected(bfloat16(made)))) == ""
    rescale = [gguf_file.read(subject.path).rescale for subject in subjects]
    assert rescale == ([0, 6, 0, 6] if version == "6" else [0, 0, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_hugging_face_folders(version, tmp_path):
    """RWKV-4 is computed by transformers itself, which also reads the tokenizer of all."""
    pytest.importorskip("transformers")
    made = conformed.model(version, vocab_size=65536)
    subjects = [Subject(conformed.write(tmp_path, made, "hf"))]
    if version != "4":
        subjects.append(Subject(conformed.write_state(tmp_path, conformed.state(made), "hf"), subjects[0].path))
    checked = check(subjects, Expected(bfloat16(made), conformed.state(made) if version != "4" else None))
    assert found(checked) == ""
    assert checked[0].reader.startswith("transformers" if version == "4" else "reference")
    assert {"vocabulary file", "dialogue", "prompts, encoded and decoded"} <= {x.what for x in checked[0].findings}


# Seeded faults. Each is made in the file alone; each must be found by structure, by logits, or by both.


def seeded(folder, tensors, change, form):
    """A file of changed tensors, as if the writer had changed them."""
    changed = {name: x.clone() for name, x in tensors.items()}
    changed = change(changed) or changed
    path = folder / f"faulty.{form}"
    checkpoint.write(path, changed) if form == "pth" else ours.write(path, changed)
    return path


def turn(name):
    def change(tensors):
        tensors[name] = tensors[name].mT.contiguous()

    return change


def swap(one, other):
    def change(tensors):
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def add(name, shape):
    def change(tensors):
        tensors[name] = torch.full(shape, 0.1, dtype=torch.bfloat16)

    return change


def drop(name):
    return lambda tensors: tensors.pop(name) is None


def scale(name, by):
    return lambda tensors: tensors.update({name: tensors[name] * by})


def reorder(tensors):
    names = sorted(tensors)
    return {name: tensors[name] for name in names}


FAULTS = {
    "untransposed matrix": (turn("blocks.1.att.key.weight"), r"blocks\.1\.att\.key\.weight is not turned"),
    "shuffled key": (swap("blocks.0.att.x_r", "blocks.0.att.x_w"), r"att\.x_r has the values of blocks\.0\.att\.x_w"),
    "stray time_state": (add("blocks.0.att.time_state", (2, 64, 64)), r"left over: blocks\.0\.att\.time_state .*its own"),
    "another stray key": (add("blocks.0.att.x_x", (1, 1, 128)), r"left over: blocks\.0\.att\.x_x"),
    "missing key": (drop("blocks.1.att.k_a"), r"missing: blocks\.1\.att\.k_a"),
    "blocks exchanged": (swap("blocks.0.ffn.value.weight", "blocks.1.ffn.value.weight"), r"has the values of blocks\."),
    "rescaled, and not said": (scale("blocks.1.att.output.weight", 0.5), r"is 0\.5 times the model's"),
    "a change of a thousandth": (scale("blocks.1.ln2.weight", 1.008), r"blocks\.1\.ln2\.weight has \d+ other values"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", ["pth", "st"])
def test_a_seeded_fault_is_found_and_named(fault, form, tmp_path):
    change, named = FAULTS[fault]
    made = conformed.model("7")
    tensors = bfloat16(made)
    checked = check([Subject(seeded(tmp_path, tensors, change, form))], Expected(tensors), "structure")
    assert not checked[0].passed
    assert [said for said in faults(checked[0]) if re.search(named, said)], found(checked)


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f not in ("stray time_state", "another stray key", "missing key")]
)
def test_logits_alone_find_it_too(fault, tmp_path, monkeypatch):
    """Where the values could not be compared, a reader of ours would still be far from the core."""
    made = conformed.model("7")
    tensors = bfloat16(made)
    path = seeded(tmp_path, tensors, FAULTS[fault][0], "st")
    (one,) = check([Subject(path)], Expected(tensors))
    assert max(row.difference / row.allowed for row in one.logits) > 5, [tuple(row) for row in one.logits]


def test_x_r_to_x_g_out_of_order_is_found(tmp_path):
    """Converters put them together as they come."""
    tensors = bfloat16(conformed.model("7"))
    checked = check([Subject(seeded(tmp_path, tensors, reorder, "pth"))], Expected(tensors), "structure")
    assert found(checked).startswith("order of x_r to x_g: a g k r v w (must be: r w k v a g")


def test_a_tensor_that_is_a_view_is_found(tmp_path):
    """A file of views brings what they are views of."""
    tensors = bfloat16(conformed.model("7"))
    both = torch.stack([tensors["ln_out.weight"], tensors["ln_out.bias"]])
    torch.save(tensors | {"ln_out.weight": both[0], "ln_out.bias": both[1]}, tmp_path / "aliased.pth")
    torch.save(tensors | {"ln_out.weight": torch.zeros(999).bfloat16()[:128] + 0}, tmp_path / "other.pth")
    torch.save(tensors | {"head.weight": tensors["head.weight"].mT.contiguous().mT}, tmp_path / "strided.pth")
    aliased, _, strided = (
        found(check([Subject(tmp_path / name)], Expected(tensors), "structure"))
        for name in ("aliased.pth", "other.pth", "strided.pth")
    )
    assert "storage of its own: ln_out.bias shares that of ln_out.weight" in aliased
    assert "contiguous: head.weight has strides (1, 64)" in strided


@pytest.mark.parametrize("form", ["pth", "st", "gguf"])
def test_a_truncated_file_is_found(form, large, tmp_path):
    made, tensors = large
    path = conformed.write(tmp_path, made, "f16" if form == "gguf" else form)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    (one,) = check([Subject(path)], Expected(tensors), "structure")
    assert faults(one)[0].startswith("clients can read it: it ")


def test_what_float16_cannot_hold_is_found(tmp_path):
    tensors = bfloat16(conformed.model("7"))
    tensors["blocks.1.ffn.key.weight"][3, 4] = 70000
    ours.write(tmp_path / "model.st", tensors)
    (one,) = check([Subject(tmp_path / "model.st")], Expected(tensors), "structure")
    assert "finite: blocks.1.ffn.key.weight has 1 (must be: no infinity and no NaN: float16 ends at 65504)" in faults(
        one
    )


def test_what_float16_flushes_to_zero_is_counted(tmp_path):
    tensors = bfloat16(conformed.model("7"))
    tensors["ln_out.bias"][:5] = 1e-9
    ours.write(tmp_path / "model.st", tensors)
    (one,) = check([Subject(tmp_path / "model.st")], Expected(tensors), "structure")
    assert one.passed
    assert one.flushed == sum(int(((x != 0) & (x.half() == 0)).sum()) for x in tensors.values()) >= 5


@pytest.mark.parametrize("divisor", [1.0, 4.0])
def test_a_model_of_another_divisor_is_found(divisor, tmp_path):
    """Clients have 8, as nearly all models have: the tensors are right, and the logits are not."""
    made = conformed.model("7")
    (one,) = check(
        [Subject(conformed.write(tmp_path, made, "st"))], Expected(bfloat16(made), head_size_divisor=divisor)
    )
    assert all(finding.passed for finding in one.findings)
    assert not any(row.passed for row in one.logits)


def wrong_state(tensors, fault):
    if fault == "turned":
        return {name: x.mT.contiguous() for name, x in tensors.items()}
    if fault == "too few":
        return dict(list(tensors.items())[:1])
    if fault == "other heads":
        return {name: x.reshape(4, 64, 32).contiguous() for name, x in tensors.items()}
    return tensors | {"blocks.0.att.ts_state": torch.zeros(128).bfloat16()}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("turned", "is not turned as the format wants it"),
        ("too few", "as many states as blocks: 1 (must be: 2"),
        ("other heads", "shape of each state: (4, 64, 32)"),
        ("too much", "no tensor is left over: blocks.0.att.ts_state"),
    ],
)
def test_a_faulty_state_is_found(fault, said, tmp_path):
    made = conformed.model("7")
    tensors = conformed.state(made)
    model = conformed.write(tmp_path, made, "pth")
    path = conformed.write_state(tmp_path, wrong_state(tensors, fault), "pth")
    (one,) = check([Subject(path, model)], Expected(bfloat16(made), tensors), "structure")
    assert said in found([one])


def test_a_turned_state_changes_the_logits(tmp_path):
    made = conformed.model("7")
    tensors = conformed.state(made)
    path = conformed.write_state(tmp_path, wrong_state(tensors, "turned"), "st")
    (one,) = check([Subject(path, conformed.write(tmp_path, made, "st"))], Expected(bfloat16(made), tensors))
    assert max(row.difference for row in one.logits) > 100 * one.logits[0].allowed


def lora(folder, rank=4):
    """A base's .st, a LoRA's, and what they make together with alpha 8."""
    made = conformed.model("7")
    base, generator = {name: x.float() for name, x in bfloat16(made).items()}, torch.Generator().manual_seed(3)
    pairs, merged = {}, {name: x.clone() for name, x in base.items()}
    for i in range(2):
        for module in ("att.key", "ffn.value"):
            w = base[f"blocks.{i}.{module}.weight"]
            a, b = (0.2 * torch.randn(s, generator=generator) for s in ((rank, w.shape[1]), (w.shape[0], rank)))
            pairs |= {f"blocks.{i}.{module}.lora.0": a.mT.half(), f"blocks.{i}.{module}.lora.1": b.half()}
            merged[f"blocks.{i}.{module}.weight"] = w + 8 / rank * b @ a
    merged["blocks.0.att.x_k"] = pairs["blocks.0.att.x_k"] = torch.rand(1, 1, 128, generator=generator)
    path = conformed.write(folder, made, "st")
    import safetensors.torch

    pairs = {name: x.half().contiguous().clone() for name, x in pairs.items()}
    safetensors.torch.save_file(pairs, folder / "lora.st", metadata={"format": "pt"})
    return path, folder / "lora.st", merged


@pytest.mark.parametrize(("alpha", "right"), [(8.0, True), (16.0, False), (2.0, False), (8.4, False)])
def test_a_lora_and_its_alpha(alpha, right, tmp_path):
    base, path, merged = lora(tmp_path)
    (one,) = check([Subject(path, base, alpha)], Expected(merged=merged))
    assert one.passed == right, found([one])


def test_a_lora_that_is_not_turned_fits_nothing(tmp_path):
    base, path, merged = lora(tmp_path)
    import safetensors.torch

    held = safetensors.torch.load_file(path)
    held["blocks.1.ffn.value.lora.0"] = held["blocks.1.ffn.value.lora.0"].mT.contiguous()
    safetensors.torch.save_file(held, path)
    (one,) = check([Subject(path, base, 8.0)], Expected(merged=merged))
    assert "do not fit blocks.1.ffn.value.weight" in found([one])


# GGUF: faults of the writer, seeded into it.


@pytest.fixture
def faulty(large, tmp_path, monkeypatch):
    """Makes a GGUF with something about its writing changed, and gives what the check says."""

    def make(mode="structure", tensors=None, form="f16", **changes):
        for name, value in changes.items():
            monkeypatch.setattr(gguf, name, value)
        path = tmp_path / "faulty.gguf"
        gguf.write(path, tensors or large[1], form, world().table)
        return found(check([Subject(path)], Expected(tensors or large[1]), mode))

    return make


def test_the_right_gguf_has_no_fault(faulty):
    assert faulty() == ""


def test_a_wrong_eot_is_found(faulty):
    assert "bos, eos, eot: bos 0, eos 0, eot 0 (must be: bos 0, eos 0, eot 261" in faulty(EOT=0)


def test_wrong_escapes_are_found(faulty, monkeypatch):
    """Tokens as UTF-8 where llama.cpp undoes escapes: those with a backslash are others."""
    whole = gguf._tokenizer

    def unescaped(writer, table, special):
        add = writer.add_token_list
        texts = [entry if entry else b"<s>" if i == 0 else b"[PAD%d]" % i for i, entry in enumerate(table)]
        writer.add_token_list = lambda _: add(texts)
        whole(writer, table, special)

    assert "tokens: " in faulty(_tokenizer=unescaped)


def test_lerps_out_of_order_are_found(faulty):
    said = faulty(_MIXES=gguf._MIXES | {7: [f"att.x_{x}" for x in "wrkvag"]})
    assert "blocks.0.att.x_r has the values of blocks.0.att.x_w" in said


def test_a_pair_that_is_not_turned_is_found(faulty):
    said = faulty(_TURNED=re.compile(r"blk\.\d+\.time_mix_([wag][12]|decay_w[12])\.weight"))
    assert "blocks.1.att.v1 is (512,), of the model (128, 4)" in said


def test_the_first_block_without_v0_is_found(faulty, monkeypatch):
    whole = gguf.from_official

    def without(tensors, form):
        return {name: part for name, part in whole(tensors, form).items() if not name.startswith("blk.0.time_mix_v0")}

    assert "no tensor is missing: blk.0.time_mix_v0.weight" in faulty(from_official=without)


def test_a_wrong_head_size_is_found(faulty):
    said = faulty("full", _head_size=lambda tensors: 128)
    assert "reference is " in said
    assert "from our logits on the ASCII prompt" in said


def test_a_chat_template_of_another_convention_is_found(faulty):
    said = faulty(chat_template=lambda: "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    assert "chat template: '<|system|>Answer in one word." in said


@pytest.mark.parametrize("kind", ["not divided", "not said"])
def test_a_wrong_rescale_is_found(kind, tmp_path, monkeypatch):
    made = conformed.model("6", n_layer=7, vocab_size=65536)
    tensors, whole = bfloat16(made), gguf._rescale
    if kind == "not divided":
        monkeypatch.setattr(gguf, "_halvings", lambda theirs, rescale: 0)
    else:
        describe = gguf._describe

        def silent(writer, tensors, form):
            monkeypatch.setattr(gguf, "_rescale", lambda version, form: 0)
            describe(writer, tensors, form)
            monkeypatch.setattr(gguf, "_rescale", whole)

        monkeypatch.setattr(gguf, "_describe", silent)
    gguf.write(tmp_path / "model.gguf", tensors, "f16", world().table)
    said = found(check([Subject(tmp_path / "model.gguf")], Expected(tensors), "structure"))
    assert "blocks.6.att.output.weight is " in said
    assert "by what the file says it must be" in said


def test_a_client_that_crashes_is_a_finding(tmp_path, monkeypatch):
    """And the files behind it are read all the same."""
    monkeypatch.setattr(child, "__name__", "rwkv_core.no_such_module")
    made = conformed.model("7")
    (one,) = check([Subject(conformed.write(tmp_path, made, "pth"))], Expected(bfloat16(made)))
    assert "rwkv computes with it: it ended with 1; it said: " in found([one])
    assert [row.passed for row in one.logits] == [True] * 3


def test_a_client_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "_SECONDS", 0.01)
    monkeypatch.setattr(child, "_SECONDS_A_GIGABYTE", 0.0)
    made = conformed.model("7")
    (one,) = check([Subject(conformed.write(tmp_path, made, "pth"))], Expected(bfloat16(made)))
    assert "rwkv computes with it: it had not ended after 0 seconds" in found([one])
