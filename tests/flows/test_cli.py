"""`rwkvflow run`, with a server and without one, and `rwkvflow merge`."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import random_models
import torch
from methods import EXAMPLES, OTHERS
from miniature import dvc, free_port, processes_in, wait_until

from flows import cli
from rwkv_core import checkpoint
from rwkv_core.adapters import attach, file, trained_state
from rwkv_core.adapters.file import AdapterRecord
from rwkv_core.files import sha256


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


@pytest.fixture
def no_server(settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")


def test_help_names_the_commands(settings: None):
    code, output = finish(start("--help"))
    assert code == 0
    assert all(command in output for command in ("up", "run", "sync", "merge", "chat"))


def test_a_problem_is_one_line(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (repository / "params.yaml").unlink()
    monkeypatch.setattr(sys, "argv", ["rwkvflow", "sync"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("rwkvflow: params.yaml: ")


def test_without_a_server_dvc_runs_alone(repository: Path, no_server: None):
    code, output = finish(start("run", "--force", "prepare"))
    assert code == 0
    assert output.startswith("No Prefect server answers at http://127.0.0.1:")
    assert "prepare: reads" in output
    assert not Path("outputs/model.txt").exists()
    assert not Path(".rwkvflow/prefect").exists()
    Path("behaviour").write_text("fail")
    code, output = finish(start("run"))
    assert code == 1
    assert "has no rows; add some" in output


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_without_a_server_a_signal_lets_the_stage_save(repository: Path, no_server: None, number: int):
    Path("behaviour").write_text("slow")
    process = start("run")
    wait_until(Path("running").exists)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 130
    assert "train: saved at step 7 and stopped" in output
    assert Path("saved").exists()
    assert not processes_in(repository)


def test_with_a_server_the_run_is_a_flow(repository: Path, prefect_server: str):
    Path("behaviour").write_text("fail")
    code, output = finish(start("run"))
    assert code == 1
    assert "stage train failed: data/x.jsonl: has no rows; add some" in output


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_with_a_server_a_signal_lets_the_stage_save(repository: Path, prefect_server: str, number: int):
    Path("behaviour").write_text("slow")
    process = start("run")
    wait_until(Path("running").exists)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 130
    assert "Finished in state Cancelled" in output
    assert Path("saved").exists()
    assert not processes_in(repository)
    Path("behaviour").write_text("ok")
    dvc("repro")


def test_the_interpreter_of_the_stages_is_ours(repository: Path, no_server: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", os.defpath)
    Path("tasks/prepare.py").write_text("import sys; print('python is', sys.executable)")
    _, output = finish(start("run", "--force", "prepare"))
    assert f"python is {Path(sys.executable).parent}" in output


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Path, Path]:
    """A small base, and a Bone adapter of it."""
    model = random_models.make()
    checkpoint.write(tmp_path / "base.pth", model.state_dict())
    attach(model, EXAMPLES[2], seed=0)
    tensors = {name: torch.ones_like(x) for name, x in trained_state(model).items()}
    record = AdapterRecord(
        format=1,
        adapter=EXAMPLES[2],
        base_sha256=sha256(tmp_path / "base.pth"),
        data_sha256="",
        vocabulary_sha256="",
        run="r",
    )
    file.write(tmp_path / "adapter.pth", tensors, record)
    return tmp_path / "base.pth", tmp_path / "adapter.pth"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["rwkvflow", *map(str, words)])
    cli.main()


def test_merge_writes_a_checkpoint_and_its_receipt(
    adapted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base, adapter = adapted
    out = tmp_path / "out.pth"
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "merge", base, f"0.5*{adapter}", adapter, out, "--layers", "0.5*1")
    assert not ended.value.code
    receipt = json.loads((tmp_path / "out.pth.receipt.json").read_text())
    assert [entry["weight"] for entry in receipt["adapters"]] == [0.5, 1.0]
    assert receipt["merged"]["sha256"] == sha256(out)
    assert capsys.readouterr().out.startswith(
        f"{out}: 4 matrices changed, 0 tensors replaced; sha256 {sha256(out)[:16]}"
    )
    start, found = checkpoint.read(base), checkpoint.read(out)
    changed = [name for name in start if not torch.equal(start[name], found[name])]
    assert changed == [f"blocks.1.{name}.weight" for name in ("att.receptance", "att.value", "ffn.key", "ffn.value")]
    for name in changed:
        torch.testing.assert_close(found[name], start[name] + 0.75)


def test_merge_writes_a_tuned_state_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model = random_models.make()
    base, adapter, out = (tmp_path / f"{name}.pth" for name in ("base", "adapter", "out"))
    checkpoint.write(base, model.state_dict(), "bf16")
    [config] = [x for x in OTHERS if x.kind == "state"]
    attach(model, config, seed=0)
    tensors = {name: torch.full_like(x, 0.5) for name, x in trained_state(model).items()}
    about = {"base_sha256": sha256(base), "data_sha256": "", "vocabulary_sha256": "", "run": "r"}
    file.write(adapter, tensors, AdapterRecord(format=1, adapter=config, **about))
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "merge", base, f"0.5*{adapter}", out)
    assert not ended.value.code
    said = capsys.readouterr().out
    assert f"{tmp_path}/out.state.pth: the tuned state, for a client to mount beside the model" in said
    assert f"{tmp_path}/out.state.rwkv-flow.pth: the same with its token shift" in said
    state = torch.load(tmp_path / "out.state.pth", weights_only=True)
    assert list(state) == [f"blocks.{i}.att.time_state" for i in range(3)]
    for x in state.values():
        assert torch.equal(x, torch.full((4, 8, 8), 0.25, dtype=torch.bfloat16))
    assert len(torch.load(tmp_path / "out.state.rwkv-flow.pth", weights_only=True)) == 9
    start, found = checkpoint.read(base), checkpoint.read(out)
    assert [name for name in start if not torch.equal(start[name], found[name])] == ["ln_out.weight", "ln_out.bias"]
    out.unlink()
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "merge", base, adapter, out)
    assert ended.value.code == 1
    assert re.match("rwkvflow: .*out.state.pth: something is there already; name another", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{base}", "half*{adapter}", "{out}"), "rwkvflow: half*.*: what stands before \\* must be a number"),
        (("{base}", "{adapter}", "{base}"), "rwkvflow: .*base.pth: something is there already; name another file"),
        (("{adapter}", "{adapter}", "{out}"), "rwkvflow: .* was trained on another base"),
    ],
)
def test_merge_names_what_is_wrong(
    words: tuple[str, ...], message: str, adapted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    base, adapter = adapted
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "merge", *(x.format(base=base, adapter=adapter, out=tmp_path / "out.pth") for x in words))
    assert ended.value.code == 1
    assert re.match(message, capsys.readouterr().err)
    assert not (tmp_path / "out.pth").exists()


def test_inspect_says_what_a_file_is(
    adapted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base, adapter = adapted
    for path, lines in (
        (base, ["is +a model, RWKV-7", "n_layer +3", f"sha256 +{sha256(base)}"]),
        (
            adapter,
            ["is +an adapter of RWKV-Flow", "kind +bone", "rank +5", "also +none", f"base_sha256 +{sha256(base)}"],
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, "inspect", path)
        assert not ended.value.code
        output = capsys.readouterr().out
        assert all(re.search(f"^{line}$", output, re.MULTILINE) for line in lines)


def test_unmerge_finds_what_was_merged(
    adapted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    base, adapter = adapted
    tuned, found, again = (tmp_path / name for name in ("tuned.pth", "found.pth", "again.pth"))
    for words in (
        ("merge", base, adapter, tuned),
        ("unmerge", base, tuned, found, "--rank", "1"),
        ("merge", base, found, again),
    ):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, *words)
        assert not ended.value.code
    said = capsys.readouterr()
    receipt = json.loads((tmp_path / "found.pth.receipt.json").read_text())
    assert re.search(
        rf"\n{found}: lora of 12 matrices, which leaves out 0\.00% of their change; 0 tensors kept whole; "
        rf"sha256 {sha256(found)[:16]}, receipt {found}\.receipt\.json\n",
        said.out,
    )
    assert receipt["adapter"]["sha256"] == sha256(found)
    assert not said.err
    want, got = checkpoint.read(tuned), checkpoint.read(again)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, atol=1e-5, rtol=1e-5)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, "unmerge", base, tuned, found, "--rank", "1")
    assert ended.value.code == 1
    assert "found.pth: something is there already; name another file" in capsys.readouterr().err
