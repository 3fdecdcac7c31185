"""Read back by the gguf package and by llama.cpp's rules, written down here once more; and by llama.cpp itself, where it is."""

import ast
import contextlib
import hashlib
import sys
from pathlib import Path

import gguf as package
import jinja2
import numpy as np
import pytest
import random_models
import torch
from checkpoints import same

from rwkv_core import checkpoint, models
from rwkv_core.data.dialogue import one_turn
from rwkv_core.errors import InputError, WorldError
from rwkv_core.formats import gguf, gguf_file
from rwkv_core.tokenizer import VOCAB_SIZE, world

SPECIAL = {"<tool>": 65530, "<工具>": 65531, "a\\n": 65535}
C, LAYERS = 64, 8


@pytest.fixture(scope="module", params=["6", "7"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def tensors(version):
    """Of more blocks than RWKV-6 adds up before it halves; head and embedding apart, which take nearly all of the time, of two
    heads."""
    made = random_models.make(version=version, n_layer=LAYERS, n_embd=C, head_size=64, vocab_size=VOCAB_SIZE)
    return {name: x.detach() for name, x in made.state_dict().items()}


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory):
    """The path of each form."""
    folder = tmp_path_factory.mktemp("gguf")
    for form in ("f32", "f16", "bf16", "q8_0"):
        gguf.write(folder / f"{form}.gguf", tensors, form, world().table, name="tiny", special=SPECIAL)
    return {form: folder / f"{form}.gguf" for form in ("f32", "f16", "bf16", "q8_0")}


@pytest.fixture(scope="module")
def reader(files):
    """The package's, which takes seconds a file."""
    return package.GGUFReader(files["f16"])


def unescaped(text: bytes) -> bytes:
    """As llama.cpp undoes it: \\t, \\n, \\r, \\xhh, and any other character behind a backslash as it is."""
    out, at = bytearray(), 0
    while at < len(text):
        if text[at : at + 1] != b"\\":
            out += text[at : at + 1]
            at += 1
        elif text[at + 1 : at + 2] == b"x":
            out.append(int(text[at + 2 : at + 4], 16))
            at += 4
        else:
            out += {b"t": b"\t", b"n": b"\n", b"r": b"\r"}.get(text[at + 1 : at + 2], text[at + 1 : at + 2])
            at += 2
    return bytes(out)


RANKS = {"decay": 8, "iclr": 6, "value_residual_mix": 4, "gate": 10}


def test_the_header_says_all_that_the_loader_asks_for(version, reader):
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.ggml.to")}
    arch = f"rwkv{version}"
    wanted = {
        "general.architecture": arch, "general.type": "model", "general.name": "tiny", "general.file_type": 1,
        "general.quantization_version": 2,
        f"{arch}.context_length": 1048576, f"{arch}.embedding_length": C, f"{arch}.block_count": LAYERS,
        f"{arch}.feed_forward_length": 4 * C if version == "7" else 224, f"{arch}.attention.head_count": 0,
        f"{arch}.attention.layer_norm_epsilon": pytest.approx(1e-5), f"{arch}.wkv.head_size": 64,
        f"{arch}.token_shift_count": 2,
        "tokenizer.ggml.model": "rwkv", "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 261,
    }  # fmt: skip
    if version == "7":
        wanted |= {f"{arch}.attention.{name}_lora_rank": rank for name, rank in RANKS.items()}
    else:
        ranks = {"time_mix_extra_dim": 4, "time_decay_extra_dim": 6, "rescale_every_n_layers": 6}
        wanted |= {f"{arch}.{key}": rank for key, rank in ranks.items()}
    template = said.pop("tokenizer.chat_template")
    assert {key: x for key, x in said.items() if not key.startswith("GGUF.")} == wanted
    assert "rwkv-world" in template  # by which llama.cpp without Jinja knows it
    tokens = reader.fields["tokenizer.ggml.tokens"]
    table = world().table
    assert len(tokens.data) == VOCAB_SIZE
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    for i, at in enumerate(tokens.data):
        text = bytes(tokens.parts[at])
        if table[i]:
            assert (unescaped(text), kinds[i]) == (table[i], package.TokenType.NORMAL)
    texts = {i: bytes(tokens.parts[tokens.data[i]]) for i in (0, *range(65530, 65536))}
    assert texts[0] == b"<s>"
    assert kinds[0] == package.TokenType.CONTROL
    for text, i in SPECIAL.items():
        assert (unescaped(texts[i]).decode(), kinds[i]) == (text, package.TokenType.USER_DEFINED)
    assert texts[65530] == b"<tool>"  # llama.cpp looks for it before it undoes anything
    assert [(texts[i], kinds[i]) for i in (65532, 65533, 65534)] == [
        (b"[PAD%d]" % i, package.TokenType.UNUSED) for i in (65532, 65533, 65534)
    ]


def test_llama_cpps_own_converter_writes_a_token_the_same_way():
    """repr of the bytes, without what is around it: also of those with both quotes."""
    for i in (1, 10, 11, 35, 40, 93, 256, 3328, 65529):
        entry = world().table[i]
        assert (
            ast.literal_eval(f"b'{repr(entry)[2:-1]}'" if b"'" not in entry or b'"' in entry else repr(entry)) == entry
        )
        assert unescaped(repr(entry)[2:-1].encode()) == entry


def test_every_tensor_is_where_and_as_the_loader_wants_it(version, reader):
    """Dimensions as ggml has them, the innermost first."""
    found = {x.name: x for x in reader.tensors}
    shapes = {name: tuple(int(n) for n in x.shape) for name, x in found.items()}
    for name in ("token_embd.weight", "output.weight"):
        assert shapes[name] == (C, VOCAB_SIZE)
    for name in (
        "token_embd_norm",
        "output_norm",
        *(f"blk.{i}.attn_norm{n}" for i in range(LAYERS) for n in ("", "_2")),
    ):
        assert shapes[f"{name}.weight"] == shapes[f"{name}.bias"] == (C,)
    vectors = ("time_mix_ln.weight", "time_mix_ln.bias", "channel_mix_lerp_k.weight")
    if version == "7":
        block = {f"time_mix_{x}0.weight": (C,) for x in "wav"}
        block |= {f"time_mix_{x}.weight": (C,) for x in ("k_k", "k_a", "r_k")}
        for x, rank in zip("wag", (8, 6, 10), strict=True):
            block |= {f"time_mix_{x}1.weight": (C, rank), f"time_mix_{x}2.weight": (rank, C)}
        block |= {"time_mix_lerp_fused.weight": (C, 1, 1, 6)}
        ffn, gated = 4 * C, ()
    else:
        block = {f"time_mix_{x}.weight": (C,) for x in ("lerp_x", "decay")} | {"channel_mix_lerp_r.weight": (C,)}
        block |= {
            "time_mix_w1.weight": (C, 20),
            "time_mix_w2.weight": (4, C, 5),
            "time_mix_first.weight": (64, C // 64),
        }
        block |= {"time_mix_decay_w1.weight": (C, 6), "time_mix_decay_w2.weight": (6, C)}
        block |= {"time_mix_lerp_fused.weight": (C, 1, 1, 5)}
        ffn, gated = 224, ("time_mix_gate", "channel_mix_receptance")
    block |= dict.fromkeys(vectors, (C,))
    for x in ("key", "value", "receptance", "output"):
        block[f"time_mix_{x}.weight"] = (C, C)
    block |= {f"{x}.weight": (C, C) for x in gated}
    block |= {"channel_mix_key.weight": (C, ffn), "channel_mix_value.weight": (ffn, C)}
    for i in range(LAYERS):
        low = (
            {"time_mix_v1.weight": (C, 4 if i else 6), "time_mix_v2.weight": (4 if i else 6, C)}
            if version == "7"
            else {}
        )
        inside = {name.split(".", 2)[2]: shape for name, shape in shapes.items() if name.startswith(f"blk.{i}.")}
        norms = {f"attn_norm{n}.{kind}": (C,) for n in ("", "_2") for kind in ("weight", "bias")}
        assert inside == block | low | norms
    large = {"output", "token_embd", "key", "value", "receptance", "gate"}
    for name, x in found.items():
        packed = name.removesuffix(".weight").removeprefix("blk.").split("mix_")[-1] in large and name.endswith(
            ".weight"
        )
        kind = package.GGMLQuantizationType.F16 if packed else package.GGMLQuantizationType.F32
        assert x.tensor_type == kind, name


def test_values_are_where_the_rules_say(version, tensors, reader):
    found = {x.name: x.data for x in reader.tensors}

    def has(theirs, x):
        np.testing.assert_array_equal(found[theirs], x.numpy().astype(found[theirs].dtype))

    has("token_embd.weight", tensors["emb.weight"])
    has("token_embd_norm.bias", tensors["blocks.0.ln0.bias"])
    has("blk.7.attn_norm_2.weight", tensors["blocks.7.ln2.weight"])
    has("blk.5.channel_mix_value.weight", tensors["blocks.5.ffn.value.weight"])
    if version == "7":
        for i, mix in enumerate("rwkvag"):
            np.testing.assert_array_equal(
                found["blk.3.time_mix_lerp_fused.weight"][i, 0, 0], tensors[f"blocks.3.att.x_{mix}"].flatten()
            )
        for x in "wag":
            has(f"blk.0.time_mix_{x}1.weight", tensors[f"blocks.0.att.{x}1"].T)
            has(f"blk.0.time_mix_{x}2.weight", tensors[f"blocks.0.att.{x}2"].T)
        for i in range(3):  # llama.cpp wants them, and never uses them
            np.testing.assert_array_equal(found[f"blk.0.time_mix_v{i}.weight"], found[f"blk.0.time_mix_a{i}.weight"])
        has("blk.1.time_mix_v1.weight", tensors["blocks.1.att.v1"].T)
        has("blk.2.time_mix_r_k.weight", tensors["blocks.2.att.r_k"].flatten())
        has("blk.2.channel_mix_lerp_k.weight", tensors["blocks.2.ffn.x_k"].flatten())
    else:
        for i, mix in enumerate("wkvrg"):
            np.testing.assert_array_equal(
                found["blk.3.time_mix_lerp_fused.weight"][i, 0, 0], tensors[f"blocks.3.att.time_maa_{mix}"].flatten()
            )
        has("blk.1.time_mix_lerp_x.weight", tensors["blocks.1.att.time_maa_x"].flatten())
        has("blk.1.time_mix_w1.weight", tensors["blocks.1.att.time_maa_w1"].T)
        has("blk.1.time_mix_w2.weight", tensors["blocks.1.att.time_maa_w2"].permute(0, 2, 1))
        has("blk.1.time_mix_decay_w2.weight", tensors["blocks.1.att.time_decay_w2"].T)
        has("blk.1.time_mix_first.weight", tensors["blocks.1.att.time_faaaa"])
        has("blk.1.channel_mix_lerp_r.weight", tensors["blocks.1.ffn.time_maa_r"].flatten())


@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "q8_0"])
def test_outputs_of_rwkv_6_are_halved_where_float16_computes(form, version, tensors, files):
    """After every sixth block; a file of wider matrices is exact, and has none of it."""
    metadata, stored = gguf_file.read(files[form])
    halved = version == "6" and form in ("f16", "q8_0")
    assert metadata.get("rwkv6.rescale_every_n_layers", 0) == (6 if halved else 0)
    for name, ours in (("time_mix_output", "att.output"), ("channel_mix_value", "ffn.value")):
        for block in (5, 6):
            x = tensors[f"blocks.{block}.{ours}.weight"] / (2 if halved and block == 6 else 1)
            got = stored[f"blk.{block}.{name}.weight"].values().float()
            torch.testing.assert_close(got, x, rtol=2**-8, atol=float(x.abs().max()) / 250)


@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "q8_0"])
def test_what_is_read_is_what_was_written(form, tensors, files):
    """Small tensors to the bit; matrices as their type rounds them, here with the package's own code."""
    back = checkpoint.read(files[form])
    assert list(back) == list(tensors)
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.float32}
    for name, x in tensors.items():
        large = x.ndim == 2 and min(x.shape) >= C and "time_maa" not in name
        wanted = x
        if large and form == "q8_0":
            packed = package.quants.quantize(x.numpy(), package.GGMLQuantizationType.Q8_0)
            wanted = torch.from_numpy(package.quants.dequantize(packed, package.GGMLQuantizationType.Q8_0))
        elif large:
            wanted = x.to(dtypes[form])
        assert (back[name].dtype, back[name].shape) == (wanted.dtype, x.shape), name
        slack = gguf.stored(name, tensors, form)[1]
        assert ((back[name].float() - wanted.float()).abs() <= slack).all(), name
    assert dict(checkpoint.each(files[form])).keys() == back.keys()
    for name, x in checkpoint.each(files[form]):
        assert torch.equal(x, back[name])
    loaded = models.load(files[form], dtype=torch.float32)
    assert loaded.config.version == ("7" if "blocks.0.att.r_k" in tensors else "6")


def test_equal_models_are_equal_files(tensors, files, tmp_path):
    gguf.write(tmp_path / "again.gguf", tensors, "q8_0", world().table, name="tiny", special=SPECIAL)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "again.gguf", files["q8_0"])}
    assert len(digests) == 1


def test_mixes_that_are_not_fused_are_read(tmp_path):
    """As files of RWKV-6 were first."""
    made = random_models.make(version="6", n_embd=C, head_size=64, vocab_size=96)
    tensors = {name: x.detach() for name, x in made.state_dict().items()}
    writer = package.GGUFWriter(tmp_path / "old.gguf", "rwkv6")
    writer.add_wkv_head_size(64)
    for name, part in gguf.from_official(tensors, "f32").items():
        if name.endswith("lerp_fused.weight"):
            for mix, row in zip("wkvrg", part.make(), strict=True):
                writer.add_tensor(name.replace("fused", mix), row.flatten().numpy())
        else:
            writer.add_tensor(name, part.make().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same(checkpoint.read(tmp_path / "old.gguf"), tensors)


CONVERSATION = [
    ("system", "Be kind.\n\n\nAnd short."), ("user", " Hi\r\n \n  there,\n friend\n"), ("assistant", "Yo"), ("user", "q?"),
]  # fmt: skip


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("asks", [True, False])
def test_the_template_renders_worlds_convention(turns, asks):
    messages = [{"role": role, "content": text} for role, text in CONVERSATION[:turns]]
    environment = jinja2.Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(gguf.chat_template()).render(messages=messages, add_generation_prompt=asks)
    wanted = "".join(f"{role.title()}: {one_turn(text)}\n\n" for role, text in CONVERSATION[:turns])
    assert rendered == wanted + ("Assistant:" if asks else "")
    assert "\r" not in rendered


def test_the_template_refuses_another_role():
    def refuse(message):
        raise ValueError(message)

    template = jinja2.Environment(autoescape=False).from_string(gguf.chat_template())
    with pytest.raises(ValueError, match="roles system, user and assistant"):
        template.render(messages=[{"role": "tool", "content": "4"}], raise_exception=refuse)


def tiny(version="7", **sizes):
    made = random_models.make(version=version, **{"n_embd": 64, "head_size": 64, "vocab_size": 96, **sizes})
    return {name: x.detach() for name, x in made.state_dict().items()}


@pytest.mark.parametrize(
    ("tensors", "form", "divisor", "found"),
    [
        (tiny("4"), "f16", 8, "gguf of an RWKV-4: llama.cpp reads RWKV-6 and 7; export pth or hf"),
        (tiny("5.2"), "f16", 8, "gguf of an RWKV-5: llama.cpp reads"),
        (tiny(head_size=32), "f16", 8, "gguf of heads of 32: llama.cpp computes with 64 and 128"),
        (tiny(vocab_size=97), "f16", 8, "gguf of a model of 97 tokens: llama.cpp has World's tokenizer, of 96"),
        (tiny(), "f16", 1, "gguf of a model with head_size_divisor 1: llama.cpp's is 8"),
        (tiny() | {"blocks.0.att.time_state": torch.zeros(1)}, "f16", 8, "gguf with blocks.0.att.time_state: llama.cpp has no"),
        (tiny() | {"blocks.0.att.key.lora_A": torch.zeros(1)}, "f16", 8, "gguf with blocks.0.att.key.lora_A"),
        (tiny() | {"blocks.0.ffn.key.weight": torch.zeros(99, 64), "blocks.0.ffn.value.weight": torch.zeros(64, 99)}, "q8_0", 8,
         "gguf in q8_0 of rows of 99: they are packed 32 values at a time; take f16 or bf16"),
    ],
)  # fmt: skip
def test_what_llama_cpp_has_no_form_for_is_refused(tensors, form, divisor, found, tmp_path):
    with pytest.raises(InputError, match=found.replace("(", r"\(")) as caught:
        gguf.write(tmp_path / "x.gguf", tensors, form, [b"x"] * 96, head_size_divisor=divisor)
    assert all((caught.value.value, caught.value.rule, caught.value.remedy))
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WorldError, match=r"gguf: .*; pip install 'rwkv-flow\[gguf\]'"):
        gguf.write(tmp_path / "x.gguf", tiny(), "f32", [b"x"] * 96)


def small(folder: Path) -> Path:
    gguf.write(folder / "small.gguf", tiny(n_layer=2), "q8_0", [b"x"] * 96)
    return folder / "small.gguf"


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    data = small(tmp_path).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 8, 23, 24, 40, 100, 1000, len(data) // 2, len(data) - 40_000]:
        path.write_bytes(data[:size])
        with pytest.raises(
            InputError, match=r"cut\.gguf: \d+ bytes that can't be read .*: the file is cut short or no GGUF"
        ):
            checkpoint.read(path)


def test_damage_in_the_header_is_refused_or_read(tmp_path):
    """Never another error, never a crash."""
    data = bytearray(small(tmp_path).read_bytes())
    path = tmp_path / "damaged.gguf"
    for at in range(0, 6000, 37):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            models.load(path, dtype=torch.float32)


def test_another_model_and_another_type_are_refused(tmp_path):
    for arch, kind, found in (
        ("llama", None, "llama: must be rwkv6 or rwkv7"),
        ("rwkv7", package.GGMLQuantizationType.Q4_0, "ggml's type 2"),
    ):
        writer = package.GGUFWriter(tmp_path / "x.gguf", arch)
        x = np.zeros((1, 18), dtype=np.uint8) if kind is not None else np.zeros((4, 4), dtype=np.float32)
        writer.add_tensor("token_embd.weight", x, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(InputError, match=found):
            checkpoint.read(tmp_path / "x.gguf")
    with pytest.raises(InputError, match="no model is there"):
        checkpoint.read(tmp_path / "nothing.gguf")


PROMPTS = [
    "User: Hello!\n\nAssistant:",
    "User: 你好，<工具>世界\n\nAssistant:",
    "def f(x):\n\treturn '''a\\n''' <tool>\"\"\n",
]


@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "q8_0"])
def test_llama_cpp_computes_the_same(form, version, tensors, files):
    """Its tokens, and its logits beside those of the file as we read it."""
    llama_cpp = pytest.importorskip("llama_cpp")
    parameters = llama_cpp.llama_model_default_params()
    parameters.use_extra_bufts = False  # its AMX code ends the process where the system does not let it use the tiles
    parameters.use_mmap = True
    loaded = llama_cpp.llama_model_load_from_file(str(files[form]).encode(), parameters)
    assert loaded
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 128, 1, 1
    words, vocabulary = world().with_special(SPECIAL), llama_cpp.llama_model_get_vocab(loaded)
    ours = models.load(files[form], dtype=torch.float32)
    tolerance = {"f32": 1e-4, "f16": 5e-3, "bf16": 0.1, "q8_0": 0.1}[
        form
    ]  # it rounds what a matrix reads to the same type
    try:
        for prompt in PROMPTS:
            context = llama_cpp.llama_init_from_model(loaded, settings)
            text, ids = prompt.encode(), (llama_cpp.llama_token * 64)()
            count = llama_cpp.llama_tokenize(vocabulary, text, len(text), ids, 64, False, False)
            assert list(ids[:count]) == words.encode(prompt)
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, count)) == 0
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(VOCAB_SIZE,)).copy()
            llama_cpp.llama_free(context)
            with torch.no_grad():
                wanted = ours(torch.tensor([list(ids[:count])]))[0][0, -1]
            assert float((torch.from_numpy(logits) - wanted).abs().max()) < tolerance
    finally:
        llama_cpp.llama_model_free(loaded)


def test_special_tokens_come_back(files, tmp_path):
    """Each text with its id; those that another program's file has among World's tokens are not on free ids."""
    assert gguf.special_tokens(files["q8_0"]) == checkpoint.special_tokens(files["q8_0"]) == SPECIAL
    writer = package.GGUFWriter(tmp_path / "other.gguf", "rwkv7")
    writer.add_token_list([b"[PAD]"] * VOCAB_SIZE)
    writer.add_token_types([4, *[1] * (VOCAB_SIZE - 2), 5])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    assert gguf.special_tokens(tmp_path / "other.gguf") == {}


def test_describe_knows_it(files, version):
    told = gguf.about(files["q8_0"])
    assert told == {
        "name": "tiny", "matrices": "q8_0", "tokenizer": "rwkv, 65536 tokens", "special tokens": ["<tool>", "<工具>", "a\\n"],
        "ends a turn": 261,
    }  # fmt: skip
