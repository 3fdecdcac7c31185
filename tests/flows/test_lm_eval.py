"""rwkvflow lm-eval: a model's file, a task's file, a table."""

import json

import pytest
from random_models import make
from typer.testing import CliRunner

from flows.cli import app
from flows.lm_eval import table
from rwkv_core import checkpoint
from rwkv_core.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    checkpoint.write(tmp_path / "model.pth", make(vocab_size=256).state_dict(), "fp32")
    rows = [{"text": f"It was the best of {i}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: bits_per_byte}]\n"
    )
    return tmp_path


def test_a_task_of_one_s_own(folder):
    words = ["lm-eval", str(folder / "model.pth"), "own", "--include", str(folder), "--limit", "4"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    header, row = done.stdout.strip().splitlines()[-2:]
    assert header.split() == ["task", "metric", "samples"]
    task, metric, number, samples = row.split()
    assert (task, metric, samples) == ("own", "bits_per_byte", "4")
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert f"{told['own']['bits_per_byte,none']:.4f}" == number
    with pytest.raises(InputError, match="no folder of tasks"):
        CliRunner().invoke(app, [*words, "--include", str(folder / "no")], catch_exceptions=False)


def test_filters_and_groups_are_named():
    lines = list(
        table(
            {"a_task": {"exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A", "alias": "x", "sample_len": 3}}
        )
    )
    assert lines[1].split() == ["a_task", "exact_match", "(strict)", "0.5000", "3"]
