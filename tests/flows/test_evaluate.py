"""`rwkvflow evaluate` as a program, and what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import cli
from flows.evaluate import table

ROOT = Path(__file__).parents[2]
CHANGE = {"value": -0.5, "low": -0.625, "high": -0.375}
METRICS = {
    "base": {"loss": 2.0, "perplexity": 7.5, "bits_per_byte": 1.0},
    "tuned": {"loss": 1.5, "perplexity": 4.5, "bits_per_byte": 0.75},
    "change": {"loss": CHANGE, "perplexity": CHANGE, "bits_per_byte": CHANGE},
    "better": 1, "documents": 30, "documents_not_scored": 2, "tokens": 900, "confidence": 0.95,
    "measures": {"sources": {name: {"base": 2.0, "tuned": 1.5, "change": CHANGE} for name in ("a.jsonl", "b")}},
}  # fmt: skip
POSITIONS = [
    {"from": 1, "to": 16, "tokens": 9, "base_loss": 3.0, "tuned_loss": 2.5, "change": -0.5, "low": -1.0, "high": 0.0}
]


def test_a_table_of_two_models():
    assert list(table(METRICS, POSITIONS, same=False)) == [
        "30 documents, 900 tokens; 2 documents have none to score",
        "                           base      tuned     change  95% interval",
        "loss, nats a token       2.0000     1.5000    -0.5000  -0.6250 to -0.3750",
        "perplexity               7.5000     4.5000    -0.5000  -0.6250 to -0.3750",
        "bits a byte              1.0000     0.7500    -0.5000  -0.6250 to -0.3750",
        "loss, a.jsonl            2.0000     1.5000    -0.5000  -0.6250 to -0.3750",
        "loss, b                  2.0000     1.5000    -0.5000  -0.6250 to -0.3750",
        "loss, tokens 1 to 16     3.0000     2.5000    -0.5000  -1.0000 to +0.0000",
        "The loss is lower than the base's.",
    ]


def test_a_table_of_one_model():
    assert list(table(METRICS, [], same=True))[1:] == [
        "loss, nats a token     1.5000", "perplexity             4.5000", "bits a byte            0.7500",
        "loss, a.jsonl          1.5000", "loss, b                1.5000",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_packed_model_beside_itself(tmp_path):
    """Told on the command line, written to a folder; the second time nothing is scored. What is not its own stays."""
    from project import write_base, write_corpus

    (tmp_path / "params.yaml").touch()  # a checkout keeps what is known of models
    write_base(tmp_path / "base.pth")
    write_corpus(tmp_path / "text.jsonl", rows=30)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "evaluate",
        "base.pth",
        "text.jsonl",
        "--quantize",
        "nf4",
        "--report",
        "--out",
        "out",
    ]

    def run():
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    first = run()
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("30 documents, ")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    receipt = json.loads(written["receipt.json"])
    assert [receipt[name]["quantize"] for name in ("base", "tuned")] == ["none", "nf4"]
    assert b"text.jsonl" in written["report.html"]
    assert len(list((tmp_path / ".rwkvflow/scores").iterdir())) == 2
    second = run()
    assert second.stdout == first.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written
    (tmp_path / "out/metrics.json").rename(tmp_path / "out/mine.txt")
    refused = run()
    assert refused.returncode == 1
    assert "rwkvflow: out: something else is there" in refused.stderr


def test_a_report_is_of_two_models_in_a_folder(tmp_path, monkeypatch, capsys):
    from project import write_base, write_corpus

    write_base(tmp_path / "base.pth")
    write_corpus(tmp_path / "text.jsonl", rows=3)
    monkeypatch.chdir(tmp_path)
    for words, told in (
        ((), "rwkvflow: --report: is written into a folder; name one: --out FOLDER\n"),
        (("--out", "out"), "rwkvflow: --report: is of two models, and this is one; give --against"),
    ):
        monkeypatch.setattr(sys, "argv", ["rwkvflow", "evaluate", "base.pth", "text.jsonl", "--report", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        assert capsys.readouterr().err.startswith(told)
    assert not (tmp_path / "out").exists()
