"""Any model on any text: what is read, what is written, and what is refused."""

import csv
import json

import numpy as np
import pytest

from rwkv_core import checkpoint, side_by_side
from rwkv_core.data.binidx import Documents, Writer
from rwkv_core.errors import InputError
from rwkv_core.evaluation.held_out import score
from rwkv_core.evaluation.subject import Subject
from rwkv_core.files import sha256
from rwkv_core.tokenizer import named

BYTES = named("bytes", {})
SETTINGS = {"ctx_len": 16, "batch": 4, "resamples": 100, "confidence": 0.9, "seed": 0}


@pytest.fixture
def subjects(tmp_path, random_model):
    for seed in range(2):
        checkpoint.write(tmp_path / f"{seed}.pth", random_model(vocab_size=256, seed=seed).state_dict())
    return [Subject(tmp_path / f"{seed}.pth", BYTES) for seed in range(2)]


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name, rows in (("a", 7), ("b", 5)):
        lines = (json.dumps({"text": f"{name} {i} " + "word " * i}) for i in range(rows))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_two_models_on_a_folder(subjects, text, tmp_path):
    metrics, positions = side_by_side.evaluate(*subjects, text, out=tmp_path / "out", **SETTINGS)
    documents, _ = side_by_side.read(text, BYTES, tmp_path)
    for name, subject in zip(("base", "tuned"), subjects, strict=True):
        scores = score(subject.model, documents, BYTES, ctx_len=100, batch=1)
        assert metrics[name] == pytest.approx(scores.summary(), rel=1e-5)
        for source, first, last in (("a.jsonl", 0, 7), ("b.jsonl", 7, 12)):
            mean = scores.nats[first:last].sum() / scores.tokens[first:last].sum()
            assert metrics["measures"]["sources"][source][name] == pytest.approx(mean, rel=1e-5)
    assert metrics["documents"] == 12
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(written) == ["documents.csv", "metrics.json", "positions.csv", "receipt.json"]
    assert json.loads(written["metrics.json"].read_text()) == metrics
    receipt = json.loads(written["receipt.json"].read_text())
    assert [receipt[name]["model"] for name in ("base", "tuned")] == [sha256(one.path) for one in subjects]
    assert receipt["data"] == {"path": str(text), "sha256": documents.digest()}
    with written["positions.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["change"]) for row in rows] == pytest.approx([row["change"] for row in positions], rel=1e-8)
    with written["documents.csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == ["a.jsonl"] * 7 + ["b.jsonl"] * 5
    total = sum(float(row["tokens"]) * float(row["tuned_loss"]) for row in rows)
    assert total / metrics["tokens"] == pytest.approx(metrics["tuned"]["loss"])


def test_a_report_of_two_models(subjects, text, tmp_path):
    """Of what is known: no training and no samples."""
    metrics, _ = side_by_side.evaluate(*subjects, text, out=tmp_path / "out", page=True, **SETTINGS)
    digests = [sha256(one.path) for one in subjects]
    page, words = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    data = json.loads((tmp_path / "out/receipt.json").read_text())["data"]["sha256"]
    for known in (*digests, data, "0.pth", "1.pth", f"{metrics['tokens']:,} tokens"):
        assert known in page
        assert known in words
    assert page.count('class="chart"') == 2
    assert "There is nothing to draw" not in page
    assert {"positions.svg", "documents.svg", "report.zh.md", "measures.csv"} <= {
        x.name for x in (tmp_path / "out").iterdir()
    }
    assert not (tmp_path / "out/loss_curve.svg").exists()
    packed = Subject(subjects[0].path, BYTES, quantize="int8")
    side_by_side.evaluate(subjects[0], packed, text, out=tmp_path / "packed", page=True, **SETTINGS)
    words = (tmp_path / "packed/report.md").read_text()
    assert words.count(digests[0]) == 1
    assert "| frozen matrices kept in | int8 |" in words


def test_token_files_are_taken_with_their_masks_and_parts(subjects, tmp_path):
    writer, draw = Writer(tmp_path / "valid"), np.random.default_rng(0)
    for i in range(6):
        writer.add([*draw.integers(1, 256, 10).tolist(), 0], np.arange(11) >= i)
    writer.close()
    documents, sources = side_by_side.read(tmp_path / "valid", BYTES, tmp_path)
    assert [tuple(source) for source in sources] == [("valid", 0, 6)]
    parts = [{"name": "x", "first": 0, "documents": 2}, {"name": "y", "first": 2, "documents": 4}]
    (tmp_path / "manifest.json").write_text(json.dumps({"valid": {"parts": parts}}))
    metrics, _ = side_by_side.evaluate(*subjects, tmp_path / "valid", **SETTINGS)
    assert metrics["tokens"] == sum(11 - i for i in range(6))
    assert list(metrics["measures"]["sources"]) == ["x", "y"]
    assert len(Documents(tmp_path / "valid")) == len(documents)


def test_what_can_t_be_compared_is_refused_in_words(subjects, text, tmp_path, random_model):
    checkpoint.write(tmp_path / "small.pth", random_model(vocab_size=64).state_dict())
    with pytest.raises(InputError, match="have vocabularies of 64 and 256 tokens"):
        side_by_side.evaluate(Subject(tmp_path / "small.pth", BYTES), subjects[0], text, **SETTINGS)
    checkpoint.write(tmp_path / "none.pth", {"x": checkpoint.read(tmp_path / "small.pth")["ln_out.weight"]})
    with pytest.raises(InputError, match=r"has no emb\.weight, so it is no RWKV"):
        side_by_side.vocabulary(tmp_path / "none.pth")
    with pytest.raises(InputError, match="there is no such file or folder"):
        side_by_side.read(tmp_path / "nothing", BYTES, tmp_path)
