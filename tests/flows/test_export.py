"""`rwkvflow export`."""

import json
import re
import sys

import golden_adapters as golden
import methods
import pytest
import random_models
import torch

from flows import cli
from rwkv_core import ai00, checkpoint
from rwkv_core.generation.opened import open_model
from rwkv_core.tokenizer import world


def say(monkeypatch, capsys, *words):
    """The exit status, and what was said on both streams."""
    monkeypatch.setattr(sys, "argv", ["rwkvflow", "export", *map(str, words)])
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        said = capsys.readouterr()
    return ended.value.code, said.out + said.err


@pytest.fixture
def model(tmp_path):
    made = random_models.make(n_embd=64, head_size=64, vocab_size=96)
    checkpoint.write(tmp_path / "model.pth", made.state_dict())
    return tmp_path / "model.pth"


def test_a_model_goes_through_every_form_and_back(model, tmp_path, monkeypatch, capsys):
    code, said = say(
        monkeypatch, capsys, model, tmp_path / "one", "--format", "hf", "--format", "st", "--dtype", "fp32"
    )
    assert code == 0
    assert f"{tmp_path / 'one'}/model.st: " in said
    assert set(json.loads((tmp_path / "one/conformance.json").read_text())["formats"]) == {"hf", "st"}
    code, _ = say(monkeypatch, capsys, tmp_path / "one/hf", tmp_path / "two", "--format", "pth")
    assert code == 0
    assert (tmp_path / "two/model.pth").read_bytes() == model.read_bytes()


def test_special_tokens_go_along_where_a_form_has_them(tmp_path, monkeypatch, capsys):
    """Said once, they are in every .gguf and folder that is made of the file, and its tokenizer has them."""
    made = random_models.make(n_layer=2, n_embd=64, head_size=64, vocab_size=65536)
    checkpoint.write(tmp_path / "model.pth", made.state_dict(), "bf16")
    special, structure = {"<tool>": 65530, "a b\\n": 65535}, ("--conformance", "structure")
    words = [word for text, i in special.items() for word in ("--special", f"{text}={i}")]
    gguf = ("--format", "gguf-f16")
    code, _ = say(monkeypatch, capsys, tmp_path / "model.pth", tmp_path / "one", *gguf, *words, *structure)
    assert code == 0
    file = tmp_path / "one/model-f16.gguf"
    code, _ = say(monkeypatch, capsys, file, tmp_path / "two", *gguf, "--format", "hf", *structure)
    assert code == 0
    assert (tmp_path / "two/model-f16.gguf").read_bytes() == file.read_bytes()
    code, said = say(monkeypatch, capsys, tmp_path / "two/hf", tmp_path / "three", "--format", "pth", *structure)
    assert code == 0
    assert "a .pth and a .st don't have: --special '<tool>=65530' --special 'a b\\n=65535'\n" in said
    for folder in ("one", "two", "three"):
        assert json.loads((tmp_path / folder / "conformance.json").read_text())["special_tokens"] == special
    for path in (file, tmp_path / "two/hf"):
        assert open_model(path, dtype="fp32", device="cpu").tokenizer.encode("x<tool>") == [*world().encode("x"), 65530]
        assert open_model(path, dtype="fp32", device="cpu", special={"<other>": 65530}).tokenizer.encode("<other>") == [
            65530
        ]
        monkeypatch.setattr(sys, "argv", ["rwkvflow", "conform", str(path), "--structure"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, capsys.readouterr().out


def test_a_state_and_a_lora_are_what_they_are(model, tmp_path, monkeypatch, capsys):
    checkpoint.write(tmp_path / "state.pth", {f"blocks.{i}.att.time_state": torch.ones(2, 4, 4) for i in range(2)})
    code, _ = say(monkeypatch, capsys, tmp_path / "state.pth", tmp_path / "states", "--format", "st", "--format", "hf")
    assert code == 0
    assert {path.name for path in (tmp_path / "states").iterdir()} == {
        "model.state", "state.fla.safetensors", "conformance.json",
    }  # fmt: skip
    lora = methods.adapter(model, methods.EXAMPLES[2], tmp_path / "bone.pth")
    code, said = say(monkeypatch, capsys, lora, tmp_path / "lora", "--format", "ai00-lora", "--base", model)
    assert code == 0
    assert "12 matrices of rank 8, alpha = 8" in said
    assert "conforms: lora (reference); see " in said
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "lora.st", "lora.toml", "conformance.json", "conformance.md",
    }  # fmt: skip
    report = json.loads((tmp_path / "lora/conformance.json").read_text())
    assert (report["alpha"], report["conformance"]["passed"]) == (8, True)
    lora = golden.FOLDER / "own-lora.pth"
    code, said = say(monkeypatch, capsys, lora, tmp_path / "unchecked", "--format", "ai00-lora")
    assert (code, "was not checked: give --base" in said) == (0, True)
    assert "conformance" not in json.loads((tmp_path / "unchecked/conformance.json").read_text())


def test_a_lora_that_ai00_would_apply_otherwise_is_refused(model, tmp_path, monkeypatch, capsys):
    lora = methods.adapter(model, methods.EXAMPLES[0], tmp_path / "lora.pth")
    monkeypatch.setattr(ai00, "_scale", lambda config: 1.0)
    code, said = say(monkeypatch, capsys, lora, tmp_path / "lora", "--format", "ai00-lora", "--base", model)
    assert code == 1
    assert "lora.st: reference is " in said
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "lora.pth", "lora.refused"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--format", "bin"), "--format bin: must be pth, st, gguf-f32"),
        (("--format", "pth", "--format", "ai00-lora"), "--format ai00-lora: is of an adapter, all else of a model"),
        (("--format", "gguf-q8_0"), "gguf of a model of 96 tokens: llama.cpp has World's tokenizer"),
        (("--format", "pth", "--special", "x"), "--special x: must be a text and its token"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(words, found, model, tmp_path, monkeypatch, capsys):
    code, said = say(monkeypatch, capsys, model, tmp_path / "out", *words)
    assert code == 1
    assert found in said
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(model, tmp_path, monkeypatch, capsys):
    code, said = say(monkeypatch, capsys, model, tmp_path, "--format", "pth")
    assert code == 1
    assert "something is there already" in said


def test_what_clients_would_compute_otherwise_is_refused_and_the_verdict_is_kept(model, tmp_path, monkeypatch, capsys):
    """Every tensor is right, but clients take the heads' norm with another epsilon than this model has."""
    out = tmp_path / "out"
    words = ("--format", "st", "--head-size-divisor", "64")
    code, said = say(monkeypatch, capsys, model, out, *words)
    assert code == 1
    assert re.match(r"rwkvflow: model\.st: reference is \S+ from our logits on the ASCII prompt", said), said
    assert f"see {out}.refused/conformance.md" in said
    assert not out.exists()
    verdict = json.loads((tmp_path / "out.refused/conformance.json").read_text())["conformance"]
    assert (verdict["passed"], verdict["conforms"]) == (False, "none")
    assert [file["passed"] for file in verdict["files"]] == [False]
    assert "| **no** | model.st | st |" in (tmp_path / "out.refused/conformance.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "out.refused"}
    code, said = say(monkeypatch, capsys, model, out, *words, "--conformance", "structure")
    assert (code, "conforms: st (structure)" in said) == (0, True)
