"""Each stage alone, as dvc.yaml calls it: what it writes, and what it says when it can't."""

import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from project import copy_of, files, make, write_base

from rwkv_core import checkpoint
from rwkv_core.adapters import file as adapter_file
from rwkv_core.data.binidx import Documents
from rwkv_core.files import sha256


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A project in which every stage has run, in order."""
    project = make(tmp_path_factory.mktemp("done"))
    project.set(export__conformance="full")
    project.said = {
        name: project.stage(name).stdout for name in ("prepare", "preview", "train", "merge", "evaluate", "export")
    }
    return project


@pytest.fixture
def fresh(done, tmp_path):
    """A copy of it that a test may damage."""
    return copy_of(done, tmp_path / "copy")


def test_prepare_accounts_for_every_row(done):
    manifest = done.json("outputs/data/manifest.json")
    assert manifest["train"]["documents"] + manifest["valid"]["documents"] == manifest["source"]["rows"] == 60
    for side in ("train", "valid"):
        documents = Documents(done.root / "outputs/data" / side)
        assert (len(documents), documents.tokens) == (manifest[side]["documents"], manifest[side]["tokens"])
        assert all(documents[i][-1] == 0 for i in range(len(documents)))


def test_train_writes_an_adapter_and_its_history(done):
    tensors, record = adapter_file.read(done.root / "outputs/train/adapter.pth")
    assert len(tensors) == 2 * 2 * 6  # A and B, two layers, six matrices
    assert record.base_sha256 == done.json("outputs/merged/receipt.json")["base"]["sha256"]
    metrics = done.json("outputs/train/metrics.json")
    assert metrics["valid_loss"] < metrics["valid_loss_before"]
    rows = (done.root / "outputs/train/history.csv").read_text().splitlines()
    assert rows[0] == "step,tokens,loss,lr,grad_norm"
    assert len(rows) == 1 + metrics["steps"]
    assert "tok/s" in done.said["train"]
    assert "left" in done.said["train"]
    assert "wkv7 on cpu, float32: cpu" in done.said["train"]
    assert not list((done.root / ".rwkvflow").rglob("last.ckpt"))  # a finished run has nothing to continue


def test_merge_changes_the_adapted_matrices_and_nothing_else(done):
    base, merged = (checkpoint.read(done.root / p) for p in ("mine/base.pth", "outputs/merged/model.pth"))
    assert list(base) == list(merged)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    tensors, _ = adapter_file.read(done.root / "outputs/train/adapter.pth")
    assert changed == {name.rsplit(".", 1)[0] + ".weight" for name in tensors}
    assert all(base[name].dtype == merged[name].dtype for name in base)


def test_evaluate_compares_and_reports(done):
    metrics = done.json("outputs/evaluate/metrics.json")
    assert metrics["better"] == 1
    assert metrics["change"]["loss"]["low"] < metrics["change"]["loss"]["value"] < metrics["change"]["loss"]["high"] < 0
    page = (done.root / "outputs/evaluate/report.html").read_text()
    assert "better than" in page
    assert page.count('class="chart"') == 3
    assert "://" not in page
    for words in ("better than", "mine/corpus.jsonl", f"{done.json('outputs/train/metrics.json')['steps']} steps"):
        assert str(words) in (done.root / "outputs/evaluate/report.md").read_text()
    assert len(done.json("outputs/evaluate/samples.json")) == 1
    measures = metrics["measures"]
    assert measures["answers"].keys() == {"exact_match", "f1"}
    assert measures["format"].keys() == {"ends", "one_turn", "plain_colons"}
    assert measures["answers"]["f1"]["items"] == measures["format"]["ends"]["items"] == 12
    assert measures["memorised"]["verbatim"]["items"] == 20
    (name, loss), *others = metrics["measures"]["sources"].items()
    assert (name, others) == ("all", [])
    assert (loss["items"], loss["base"]) == (metrics["documents"], metrics["base"]["loss"])
    assert loss["change"] == metrics["change"]["loss"]
    with (done.root / "outputs/evaluate/positions.csv").open() as file:
        positions = list(csv.DictReader(file))
    assert [row["from"] for row in positions[:2]] == ["1", "17"]
    assert sum(int(row["tokens"]) for row in positions) == metrics["tokens"]
    with (done.root / "outputs/evaluate/documents.csv").open() as file:
        assert {row["source"] for row in csv.DictReader(file)} == {"all"}


@pytest.mark.slow
def test_a_base_is_scored_once_and_the_outputs_are_the_same_bytes(done, fresh):
    """With all of it known, with the base known, and with nothing."""
    before = files(done)
    for known, scored in (("none", ["base", "tuned"]), ("all", []), ("base", ["tuned"])):
        if known == "base":
            tuned = sha256(fresh.root / "outputs/merged/model.pth")
            for entry in (fresh.root / ".rwkvflow/scores").glob("*.jsonl"):
                if tuned in entry.read_text():
                    entry.unlink()
        shutil.rmtree(fresh.root / "outputs/evaluate")
        said = fresh.stage("evaluate").stdout
        assert [name for name in ("base", "tuned") if f"scoring the {name}" in said] == scored
        assert files(fresh) == before


@pytest.mark.slow
def test_general_text_is_judged_on_and_must_lie_where_dvc_looks(fresh):
    rows = [{"text": f"{i} The quick brown fox jumps over the lazy dog {i * 7}."} for i in range(12)]
    (fresh.root / "mine/general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fresh.set(evaluate__general="mine/general.jsonl")
    failed = fresh.stage("evaluate", check=False)
    assert "evaluate.general = mine/general.jsonl: must be in evaluation/" in failed.stdout
    shutil.copy(fresh.root / "mine/general.jsonl", fresh.root / "evaluation/general.jsonl")
    fresh.set(evaluate__general="evaluation/general.jsonl")
    fresh.stage("evaluate")
    (loss,) = fresh.json("outputs/evaluate/metrics.json")["measures"]["general"].values()
    assert loss["items"] == 12


@pytest.mark.slow
def test_evaluate_asks_the_user_s_own_questions(fresh):
    """Of files, and of a task of lm-eval that reads the same file: the numbers are the same."""
    rows = [{"question": f"What is {i}?", "choices": ["the state", "a token"], "answer": i % 2} for i in range(20)]
    (fresh.root / "evaluation/exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (fresh.root / "evaluation/exam.yaml").write_text(
        "task: exam\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        "dataset_kwargs: {data_files: {test: evaluation/exam.jsonl}}\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_target: answer\ndoc_to_choice: "{{choices}}"\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    asked = {"tasks": ["exam"], "include": "evaluation", "limit": None, "num_fewshot": None}
    fresh.set(evaluate__tasks={"exam": "evaluation/exam.jsonl"}, evaluate__lm_eval=asked, evaluate__answers=None)
    fresh.stage("evaluate", HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(fresh.root / "cache"))
    measures = fresh.json("outputs/evaluate/metrics.json")["measures"]
    assert measures["tasks"] == measures["lm_eval"]
    assert measures["tasks"].keys() == {"exam/acc", "exam/acc_norm"}
    assert "answers" not in measures


def test_what_the_stages_made_is_in_mlflow(done):
    code = (
        "import json, mlflow; c = mlflow.MlflowClient('sqlite:///mlflow.db'); e = c.get_experiment_by_name('rwkv-flow');"
        "(r,) = c.search_runs([e.experiment_id]); folders = ('train', 'merged', 'evaluate', 'export');"
        "print(json.dumps([r.info.status, sorted(r.data.metrics), [len(c.list_artifacts(r.info.run_id, f)) for f in folders]]))"
    )
    status, metrics, artifacts = json.loads(done.run(sys.executable, "-c", code).stdout.splitlines()[-1])
    assert status == "FINISHED"
    assert {"train/loss", "valid/loss", "evaluate/tuned/loss"} <= set(metrics)
    assert all(artifacts), artifacts


def test_export_writes_what_it_checked(done):
    whole = done.json("outputs/export/conformance.json")
    assert set(whole["formats"]) == {"pth", "st"}
    verdict = whole["conformance"]
    assert (verdict["passed"], verdict["mode"]) == (True, "full")
    assert verdict["conforms"] == "pth (rwkv 0.8.32), st (reference)"
    assert f"conforms: {verdict['conforms']}" in done.said["export"]
    assert [len(file["logits"]) for file in verdict["files"]] == [6, 3]
    assert "| model.pth | pth | rwkv 0.8.32 |" in (done.root / "outputs/export/conformance.md").read_text()
    merged, exported = (checkpoint.read(done.root / f"outputs/{p}/model.pth") for p in ("merged", "export"))
    assert all(torch.equal(merged[name], exported[name]) for name in merged)


@pytest.mark.slow
def test_an_export_that_does_not_conform_leaves_the_former_and_its_verdict(done, fresh):
    """Every tensor is right; but the model is said to have another epsilon than clients take."""
    before = files(fresh)
    fresh.set(export__conformance="full", model__head_size_divisor=1)
    failed = fresh.stage("export", check=False)
    assert failed.returncode == 1
    told = failed.stdout.splitlines()[-1]
    assert re.match(r"export: model\.pth: reference is \S+ from our logits on the ASCII prompt", told), failed.stdout
    assert "see .rwkvflow/refused/conformance.md" in told
    assert "Traceback" not in failed.stdout
    assert files(fresh) == before
    verdict = fresh.json(".rwkvflow/refused/conformance.json")["conformance"]
    assert (verdict["passed"], verdict["conforms"]) == (False, "none")
    said = (fresh.root / ".rwkvflow/refused/conformance.md").read_text()
    assert "| **no** | model.pth | pth | rwkv 0.8.32 |" in said
    fresh.set(model__head_size_divisor=8)
    assert f"conforms: {done.json('outputs/export/conformance.json')['conformance']['conforms']}" in (
        fresh.stage("export").stdout
    )


def test_the_export_has_a_card_without_a_place_on_this_machine(done):
    text = (done.root / "outputs/export/README.md").read_text()
    assert text.startswith("---\nlibrary_name: ")
    assert "fine-tuned from base.pth on corpus.jsonl" in text
    assert done.json("outputs/merged/receipt.json")["base"]["sha256"] in text
    assert f"| {done.json('outputs/evaluate/metrics.json')['documents']} | better |" in text
    assert "mine/" not in text
    assert str(done.root) not in text


STATE = {"kind": "state", "state": "wkv", "layers": "all", "also": [], "load": None}
LORA_AND_STATE = {
    "kind": "lora", "rank": 2, "alpha": 4, "rank_stabilized": False, "dropout": 0.0, "dora": False, "load": None,
    "targets": ["att.*"], "layers": "all", "also": [], "state": "wkv and token shift",
}  # fmt: skip


@pytest.fixture(scope="module", params=[STATE, LORA_AND_STATE], ids=["state", "lora and state"])
def tuned(request, tmp_path_factory):
    """A project that has tuned a state, alone or beside a LoRA."""
    project = make(tmp_path_factory.mktemp("tuned"), tracked=False)
    project.adapter = request.param
    project.set(adapter=request.param, train__rows="pad", train__ctx_len=40, train__epochs=6)
    if request.param is STATE:
        project.set(train__optimizer__lr=0.5, train__optimizer__lr_final=0.05)
    project.said = {
        name: project.stage(name).stdout for name in ("prepare", "preview", "train", "merge", "evaluate", "export")
    }
    return project


@pytest.mark.slow
def test_a_tuned_state_goes_through_the_pipeline(tuned):
    outputs = tuned.root / "outputs"
    alone, whole = tuned.adapter is STATE, "token shift" in tuned.adapter["state"]
    names = [f"blocks.{i}.att.time_state" for i in range(2)]
    tensors, record = adapter_file.read(outputs / "train/adapter.pth")
    assert record.adapter.model_dump(mode="json") == tuned.adapter
    parts = 3 if whole else 1
    assert len(tensors) == 2 * parts + (0 if alone else 2 * 2 * 4)
    files = {"model.pth", "state.pth", "receipt.json", *(["state.rwkv-flow.pth"] if whole else [])}
    assert {path.name for path in (outputs / "merged").iterdir()} == files
    base, merged = (checkpoint.read(path) for path in (tuned.root / "mine/base.pth", outputs / "merged/model.pth"))
    assert list(base) == list(merged)
    assert all(torch.equal(base[name], merged[name]) for name in base) == alone
    state = torch.load(outputs / "merged/state.pth", weights_only=True)
    assert list(state) == names
    for name, x in state.items():
        assert x.any()
        assert torch.equal(x, tensors[name].bfloat16())
    receipt = tuned.json("outputs/merged/receipt.json")
    assert receipt["states"]["state.pth"]["sha256"] == sha256(outputs / "merged/state.pth")
    exported = tuned.json("outputs/export/conformance.json")
    assert torch.equal(torch.load(outputs / "export/state.pth")[names[0]], state[names[0]])
    assert exported["formats"]["st"]["state"]["file"] == "model.state"
    assert (outputs / "export/model.state").exists()
    assert "outputs/export/state.pth" in tuned.said["export"]


@pytest.mark.slow
def test_a_tuned_state_is_judged_mounted(tuned):
    """Both models on all tokens but each document's first."""
    documents = Documents(tuned.root / "outputs/data/valid")
    metrics = tuned.json("outputs/evaluate/metrics.json")
    assert metrics["tokens"] == documents.tokens - len(documents)
    assert metrics["tuned"]["loss"] < metrics["base"]["loss"] - 0.2
    assert metrics["better"] == 1
    state = tuned.root / "outputs/merged" / ("state.rwkv-flow.pth" if tuned.adapter is not STATE else "state.pth")
    assert tuned.json("outputs/evaluate/receipt.json")["tuned"]["state_sha256"] == sha256(state)
    page = (tuned.root / "outputs/evaluate/report.html").read_text()
    assert sha256(state)[:16] in page
    assert f"the initial state ({tuned.adapter['state']})" in page


@pytest.mark.slow
def test_what_documents_lose_is_told(tuned):
    sizes = Documents(tuned.root / "outputs/data/train").sizes - 1
    metrics = tuned.json("outputs/train/metrics.json")
    cut, lost = int((sizes > 40).sum()), int((sizes - 40).clip(0).sum())
    assert cut > 0
    assert (metrics["documents_cut"], metrics["tokens_left_out"]) == (cut, lost)
    assert (
        f"train.rows = pad with ctx_len = 40 cuts {cut} of {len(sizes)} documents off: {lost} tokens are left out in"
        in tuned.said["train"]
    )
    assert metrics["valid_loss"] < metrics["valid_loss_before"]
    assert metrics["tokens"] == 6 * (int(sizes.sum()) - lost)


@pytest.mark.slow
def test_the_same_inputs_make_the_same_bytes(done, fresh):
    fresh.set(export__conformance="full")  # as of the other
    for name in ("prepare", "preview", "train", "merge", "evaluate", "export"):
        fresh.stage(name)
    before, after = files(done), files(fresh)
    varying = {f"outputs/train/{name}" for name in ("run.json", "metrics.json", "train_log.txt")}  # times and speeds
    varying |= {f"outputs/evaluate/report.{form}" for form in ("html", "md", "zh.md")}  # which say them, and the commit
    varying |= {"outputs/export/README.md"}
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name] and name not in varying] == []


GARBAGE = "mine/other.pth"


def truncate(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def bad_inputs():
    """Of each kind one or two: what readers refuse is tested where they are, in tests/rwkv_core."""

    def source(text):
        return lambda p: (p.root / "mine/corpus.jsonl").write_bytes(text)

    def base(damage):
        return lambda p: damage(p.root / "mine/base.pth")

    def setting(**values):
        return lambda p: p.set(**values)

    yield "prepare", lambda p: (p.root / "mine/corpus.jsonl").unlink(), ["mine/corpus.jsonl", "correct data.source"]
    yield "prepare", source(b""), ["0 rows", "give it rows"]
    yield "prepare", source(b'{"text": "a"}\n{"text": "b" "c"}\n'), ["corpus.jsonl:2:14", "is not JSON"]
    yield "prepare", source(b'{"text": "a"}\n{"txt": "b"}\n'), ["corpus.jsonl:2", "'txt'", "columns says what"]
    yield "prepare", source('{"text": "é'.encode() + b"\xff" + b'"}\n'), ["corpus.jsonl:1:12", "0xff", "UTF-8"]
    yield "prepare", setting(data__holdout__fraction=2.0), ["data.holdout.fraction = 2.0", "less than 1"]
    yield "prepare", setting(data__holdout__fraction=1e-9), ["none of them on the valid side", "data.holdout.fraction"]
    yield "train", base(lambda f: truncate(f, 0.5)), ["base.pth", "cut short"]
    yield "train", base(lambda f: torch.save({"a": Malicious()}, f)), ["system", "must not run code", "do not trust"]
    yield "prepare", setting(adapter__state="wkv"), ["train.rows = stream", "begin anywhere; set pad, pack or chunk"]
    yield "train", setting(adapter__targets=["att.kye"]), ["att.kye", "att.key"]
    yield (
        "train",
        setting(adapter__load="outputs/train/adapter.pth"),
        ["must be in start/", "cp -r outputs/train/adapter.pth"],
    )
    yield "train", setting(train__optimizer__warmup_steps=10_000), ["warmup_steps = 10000", "optimizer steps"]
    yield (
        "merge",
        base(lambda f: write_base(f, seed=1)),
        ["base.pth", "was trained on another base", "merge it into that one"],
    )
    yield "merge", lambda p: truncate(p.root / "outputs/train/adapter.pth", 0.7), ["adapter.pth", "cut short"]
    yield "evaluate", lambda p: truncate(p.root / "outputs/merged/model.pth", 0.7), ["model.pth", "cut short"]
    yield "evaluate", lambda p: truncate(p.root / "outputs/data/valid.bin", 0.5), ["valid.bin", "its index says"]
    yield (
        "evaluate",
        setting(evaluate__tasks={"exam": "mine/x.jsonl"}),
        ["must be in evaluation/", "evaluate.tasks.exam"],
    )
    yield "evaluate", setting(evaluate__tasks={"exam": "evaluation/README.md"}), ["README.md: .md", "read are .jsonl"]
    yield "export", setting(export__formats=["gguf"]), ["gguf of heads of 8", "llama.cpp computes with 64 and 128"]


def quick_and_slow(cases):
    """One of each stage now, for a stage takes seconds to start; the others are slow."""
    begun = set()
    for stage, *rest in cases:
        yield pytest.param(stage, *rest, marks=[pytest.mark.slow] if stage in begun else [])
        begun.add(stage)


@pytest.mark.parametrize(
    ("stage", "damage", "said"), list(quick_and_slow(bad_inputs())), ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_input_is_one_message_exit_code_1_and_nothing_lost(fresh, stage, damage, said):
    damage(fresh)
    before = files(fresh)
    failed = fresh.stage(stage, check=False)
    assert failed.returncode == 1, failed.stdout
    assert "Traceback" not in failed.stdout
    assert [words for words in said if words not in failed.stdout] == [], failed.stdout
    last = failed.stdout.strip().splitlines()[-1]
    assert "; " in failed.stdout, last
    assert files(fresh) == before
    assert not (fresh.root / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "preview", "train", "merge", "evaluate", "export"])
def test_a_full_disk_is_explained_and_leaves_the_previous_outputs(fresh, stage):
    """No file may grow past 1 kB: what a write to a full disk raises, raised by the kernel."""
    before = files(fresh)
    limit = f"ulimit -f 1; trap '' XFSZ; exec {sys.executable} -m tasks.{stage}"
    failed = fresh.run("bash", "-c", limit, check=False)
    assert failed.returncode == 1, failed.stdout
    assert "free some space and run again" in failed.stdout
    assert files(fresh) == before


def test_a_file_where_the_outputs_belong_is_explained(fresh):
    shutil.rmtree(fresh.root / "outputs")
    (fresh.root / "outputs").write_text("in the way")
    failed = fresh.stage("prepare", check=False)
    assert failed.returncode == 1
    assert "a file stands where a folder must be; move it away" in failed.stdout


def test_an_unwritable_folder_is_explained(fresh):
    before = files(fresh)
    (fresh.root / "outputs").chmod(0o555)
    # root may write anywhere unless it gives that right away
    humble = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    failed = fresh.run(*humble, sys.executable, "-m", "tasks.prepare", check=False)
    (fresh.root / "outputs").chmod(0o755)
    assert failed.returncode == 1, failed.stdout
    assert "the folder must be writable; change its permissions" in failed.stdout
    assert files(fresh) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_saves_and_continues_to_the_same_bytes(done, fresh, number):
    shutil.rmtree(fresh.root / "outputs/train")
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.train"], cwd=fresh.root, env=fresh.environment, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(number)
            break
    said = process.communicate()[0]
    assert process.returncode == 128 + number, said
    assert "run again to continue" in said
    assert not (fresh.root / "outputs/train/adapter.pth").exists()
    again = fresh.stage("train").stdout
    assert "continuing after step" in again
    for name in ("adapter.pth", "history.csv", "valid.csv"):
        assert (fresh.root / "outputs/train" / name).read_bytes() == (done.root / "outputs/train" / name).read_bytes()


@pytest.mark.slow
def test_a_training_killed_at_random_continues_to_the_same_bytes(done, fresh):
    shutil.rmtree(fresh.root / "outputs/train")
    for wait in (0.0, 0.05, 0.11, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.train"], cwd=fresh.root, env=fresh.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        for line in process.stdout:
            if line.startswith(("step ", "continuing")):
                break
        time.sleep(wait)
        process.kill()
        process.communicate()
    fresh.stage("train")
    for name in ("adapter.pth", "history.csv", "valid.csv"):
        assert (fresh.root / "outputs/train" / name).read_bytes() == (done.root / "outputs/train" / name).read_bytes()


@pytest.mark.slow
def test_other_settings_do_not_continue_the_old_run(fresh):
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.train"], cwd=fresh.root, env=fresh.environment, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    fresh.set(train__optimizer__lr=0.02)
    assert "continuing" not in fresh.stage("train").stdout
    assert json.loads((fresh.root / "outputs/train/metrics.json").read_text())["resumed_at"] == 0


@pytest.mark.slow
def test_a_training_goes_on_from_an_adapter(done, fresh):
    shutil.copy(fresh.root / "outputs/train/adapter.pth", fresh.root / "start/first.pth")
    fresh.set(adapter__load="start/first.pth")
    fresh.stage("train")
    metrics, before = (p.json("outputs/train/metrics.json") for p in (fresh, done))
    assert metrics["valid_loss_before"] == before["valid_loss"]
    assert metrics["valid_loss"] < before["valid_loss"]
    _, first = adapter_file.read(done.root / "outputs/train/adapter.pth")
    _, record = adapter_file.read(fresh.root / "outputs/train/adapter.pth")
    assert (first.loaded, first.run == record.run) == (None, False)
    assert record.loaded == sha256(fresh.root / "start/first.pth")
    fresh.stage("merge")
    fresh.stage("evaluate")
    assert "start/first.pth" in (fresh.root / "outputs/evaluate/report.html").read_text()
    once = files(fresh)["outputs/train/adapter.pth"]
    (fresh.root / "start/first.pth").rename(fresh.root / "start/other.pth")  # what it is called changes no byte
    fresh.set(adapter__load="start/other.pth")
    fresh.stage("train")
    assert files(fresh)["outputs/train/adapter.pth"] == once


@pytest.mark.slow
def test_a_method_of_peft_and_rows_of_tokens_go_through(fresh):
    fresh.set(
        adapter={
            "kind": "peft", "config": {"peft_type": "LOKR", "r": 2, "alpha": 4}, "targets": ["att.*", "ffn.key"],
            "layers": "all", "also": ["emb.weight[0 101-199]", "head.weight[0 101-199]", "ln_out.*"], "load": None,
            "state": "none",
        }
    )  # fmt: skip
    for name in ("train", "merge", "evaluate"):
        fresh.stage(name)
    metrics = fresh.json("outputs/train/metrics.json")
    assert metrics["valid_loss"] < metrics["valid_loss_before"]
    evaluated = fresh.json("outputs/evaluate/metrics.json")
    assert evaluated["tuned"]["loss"] < evaluated["base"]["loss"]
    tensors, record = adapter_file.read(fresh.root / "outputs/train/adapter.pth")
    assert record.adapter.config["peft_type"] == "LOKR"
    assert tensors["head.values"].shape == (100, 32)
    assert "LOKR" in (fresh.root / "outputs/evaluate/report.html").read_text()
    base, merged = (checkpoint.read(fresh.root / p) for p in ("mine/base.pth", "outputs/merged/model.pth"))
    for name in ("emb.weight", "head.weight"):
        moved = (base[name] != merged[name]).any(1).nonzero().squeeze(1)
        assert len(moved)
        assert set(moved.tolist()) <= {0, *range(101, 200)}  # 0 ends each document


def test_a_limit_on_file_size_is_what_the_test_says():
    """The disk-full test above stands on this."""
    code = "import resource,signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); open('/dev/shm/x','wb').write(b'0'*99999)"
    limit = (8192, 8192)
    failed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    assert "File too large" in failed.stderr
