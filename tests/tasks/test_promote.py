"""The gate on models that are trained here: what is no better never becomes the champion, what is better does."""

import itertools
import json
import shutil
import threading
import time

import pytest
import torch
from registered import Checkout, dialogues, is_held_out

from rwkv_core import checkpoint
from rwkv_core.errors import InputError
from rwkv_core.files import sha256, write_json
from rwkv_core.merge import Part, merge
from tasks import lineage, promote, registry, stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _alone():
    """No MLflow: its part is tested with it. One thread: the trainings are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    checkout = Checkout(tmp_path_factory.mktemp("base"))
    checkout.make_base()
    return checkout.base


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A checkout with a good model, some of whose rows were wrong, and a better one."""
    checkout = Checkout(tmp_path_factory.mktemp("trained"), base)
    checkout.good = checkout.tuned(1, shuffled=0.3, steps=120)
    checkout.better = checkout.tuned(2, steps=100)
    return checkout


@pytest.fixture
def checkout(trained, base, tmp_path):
    """A copy of it for a test to change."""
    shutil.copytree(trained.root, tmp_path / "copy")
    copy = Checkout(tmp_path / "copy", base)
    copy.good, copy.better = copy.registry.versions()
    return copy


def ask(checkout, version, said=None):
    """Promote a version: whether it passed, and what each check said."""
    outcome = promote.promote(
        checkout.root, version.key[:12], checkout.params, (said if said is not None else []).append
    )
    verdict = registry.verdict(version)
    assert outcome.promoted == verdict["passed"]
    if outcome.promoted:
        assert checkout.registry.champion() == version
    return outcome.promoted, {check["what"]: check for check in verdict["checks"]}, verdict


def test_shuffled_answers_never_promote(base, tmp_path):
    """20 trainings on pairs that were shuffled; and the same on true pairs, so that this can fail."""
    checkout = Checkout(tmp_path, base)
    for seed in range(20):
        promoted, checks, _ = ask(checkout, checkout.tuned(100 + seed, shuffled=1))
        assert not promoted, checks
        assert [name for name, check in checks.items() if not check["passed"]] == ["held-out loss against the base"]
    promoted, checks, _ = ask(checkout, checkout.tuned(200))
    assert promoted, checks


def test_a_better_model_takes_the_place_and_a_worse_one_does_not(checkout):
    """Each against base and champion; going back restores the one before."""
    assert ask(checkout, checkout.good)[0]
    assert ask(checkout, checkout.better)[0]
    promoted, checks, verdict = ask(checkout, checkout.good)
    assert not promoted
    assert checks["held-out loss against the base"]["passed"]
    assert not checks["held-out loss against the champion"]["passed"]
    assert checkout.registry.champion() == checkout.better
    assert verdict["champion"] == checkout.better.key
    was, now = promote.rollback(checkout.root, checkout.params, print)
    assert (was, now) == (checkout.better.key, checkout.good)
    assert checkout.registry.champion() == checkout.good
    assert now.damage() is None


def test_an_identical_model_does_not_promote(checkout):
    """The same file; the same weights in another file; the base itself: even with a margin of 0."""
    checkout.params = Checkout(checkout.root, checkout.base, held_out=0.0).params
    assert ask(checkout, checkout.good)[0]
    promoted, checks, _ = ask(checkout, checkout.good)
    assert not promoted
    assert list(checks) == ["another model than the champion"]
    twin = copy_of(checkout, checkout.good, lambda tensors: tensors)
    promoted, checks, _ = ask(checkout, twin)
    assert not promoted
    assert "+0.0000 (95% interval +0.0000 to +0.0000)" in checks["held-out loss against the champion"]["found"]
    same = copy_of(checkout, checkout.good, lambda tensors: checkpoint.read(checkout.base))
    promoted, checks, _ = ask(checkout, same)
    assert not promoted
    assert "+0.0000 (95% interval +0.0000 to +0.0000)" in checks["held-out loss against the base"]["found"]
    assert checkout.registry.champion() == checkout.good


def copy_of(checkout, version, changed):
    """A version like another, of other tensors, in an order of their own so that the bytes differ in any case."""
    folder = checkout.registry.folder / "made"
    shutil.copytree(version.folder, folder)
    (folder / registry.VERDICT).unlink(missing_ok=True)
    tensors = changed(checkpoint.read(version.model))
    (folder / stage.MODEL).unlink()
    checkpoint.write(folder / stage.MODEL, dict(reversed(tensors.items())))
    digest = sha256(folder / stage.MODEL)
    values = json.loads((folder / "version.json").read_text())
    values |= {"merged": digest, "number": values["number"] + 100}
    values["files"][stage.MODEL.as_posix()] = digest
    (folder / "version.json").write_text(json.dumps(values))
    return checkout.registry.find(shutil.move(folder, folder.with_name(digest[:12])).name)


def test_a_model_with_nan_never_promotes(checkout):
    def broken(tensors):
        tensors["blocks.1.ffn.value.weight"][3, 3] = float("nan")
        return tensors

    promoted, checks, _ = ask(checkout, copy_of(checkout, checkout.good, broken))
    assert not promoted
    assert not checks["losses are numbers"]["passed"]
    assert not checks["exports conform"]["passed"]


def test_changed_bytes_never_promote(checkout):
    data = bytearray(checkout.good.model.read_bytes())
    data[len(data) // 2] ^= 1
    checkout.good.model.unlink()
    checkout.good.model.write_bytes(data)
    promoted, checks, _ = ask(checkout, checkout.good)
    assert not promoted
    assert "other bytes than were registered" in checks["files are those registered"]["found"]


def test_exports_with_other_bytes_never_promote(checkout):
    path = checkout.good.folder / stage.EXPORT / "conformance.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"formats": {"pth": {"sha256": "0" * 64}}}))
    promoted, checks, _ = ask(checkout, checkout.good)
    assert not promoted
    assert checks["exports conform"]["found"] == "pth: other bytes than the stage exported"
    assert not (checkout.good.folder / "exports").exists()


def test_exports_that_do_not_conform_never_promote(checkout):
    """A model that was trained with another epsilon than clients take: they would compute otherwise than what was judged."""
    record = checkout.good.folder / "outputs/train/run.json"
    values = json.loads(record.read_text())
    values["base"]["head_size_divisor"] = 1.0
    record.unlink()
    record.write_text(json.dumps(values))
    settings = checkout.params.export.model_copy(update={"conformance": "full", "formats": ("st",)})
    checkout.params = checkout.params.model_copy(update={"export": settings})
    promoted, checks, _ = ask(checkout, checkout.registry.find(checkout.good.key[:12]))
    assert not promoted
    assert [name for name, check in checks.items() if not check["passed"]] == ["exports conform"]
    assert "model.st: reference is " in checks["exports conform"]["found"]
    assert checkout.registry.champion() is None
    assert not (checkout.good.folder / "exports").exists()
    values["base"]["head_size_divisor"] = 8.0
    record.write_text(json.dumps(values))
    promoted, checks, _ = ask(checkout, checkout.registry.find(checkout.good.key[:12]))
    assert promoted, checks
    assert checks["exports conform"]["found"] == "st (reference): exported here for the first time"


def test_rows_that_the_champion_was_trained_on_are_left_out(checkout):
    """The champion has learned some of the rows that the candidate holds out; then all of them."""
    held_out = [row for row in dialogues(400, 2, shuffled=0) if is_held_out(row)]
    free = (name for i in itertools.count() if not is_held_out({"topic": (name := f"free {i}")}))
    for count, passes in ((60, True), (len(held_out), False)):
        checkout.registry.promote(checkout.good, None)
        checkout.prepare([{**row, "topic": next(free)} for row in held_out[:count]] + dialogues(50, 3, shuffled=0))
        for path in (checkout.good.folder / stage.DATA).glob("train.*"):
            path.unlink()
            shutil.copyfile(checkout.root / stage.DATA / path.name, path)
        promoted, checks, verdict = ask(checkout, checkout.better)
        assert promoted == passes, checks
        left_out = f"{count} of {len(held_out)} held-out documents are left out: the champion was trained on them"
        assert any(note.startswith(left_out) for note in verdict["notes"])
        found = checks["held-out loss against the champion"]["found"]
        assert (f"{len(held_out) - count} documents" if passes else "none has a token") in found


def test_what_can_t_be_compared_is_refused_in_words(checkout):
    checkout.registry.promote(checkout.better, None)
    manifest = checkout.better.folder / stage.MANIFEST
    values = json.loads(manifest.read_text())
    manifest.unlink()
    manifest.write_text(json.dumps(values | {"vocabulary": {"sha256": "0" * 64}}))
    with pytest.raises(InputError, match="version 1 and champion 2: have different tokenizers"):
        ask(checkout, checkout.good)
    file = checkout.better.folder / "version.json"
    values = json.loads(file.read_text())
    del values["files"]["outputs/data/train.bin"]
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"version 2 .*: the rows it was trained on are not kept"):
        ask(checkout, checkout.good)
    record = checkout.good.folder / "outputs/train/run.json"
    values = json.loads(record.read_text())
    values["base"]["sha256"] = "0" * 64
    (checkout.registry.folder / "champions.json").unlink()
    record.unlink()
    record.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"base\.pth: is another file now: version 1 was trained on sha256 0000"):
        ask(checkout, checkout.good)


def test_forgetting_and_form_hold_a_model_back(checkout):
    """Tuned on one-word answers, it gets worse at other text; asked, it answers and ends."""
    text = checkout.root / "general.jsonl"
    rows = [{"text": f"{i} The quick brown fox jumps over the lazy dog {i * 7}."} for i in range(30)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for margin, passes in ((0.0, False), (50.0, True)):
        answers = {"count": 6, "max_tokens": 30, "ended": 1.0}
        rules = {"retention": {"margin": margin}, "answers": answers}
        checkout.params = Checkout(checkout.root, checkout.base, general=text, **rules).params
        promoted, checks, verdict = ask(checkout, checkout.better)
        measured = verdict["measures"]["base"]["general"]["loss"]
        assert (measured["items"], measured["better"]) == (30, -1)
        assert f"{measured['base']:.4f} to {measured['tuned']:.4f}" in checks["general text against the base"]["found"]
        assert verdict["measures"]["base"]["sources"]["all"]["better"] == 1
        assert promoted == passes
        assert checks["general text against the base"]["passed"] == passes
        assert checks["answers end"]["found"] == "6 of 6 do"
    checkout.params = Checkout(checkout.root, checkout.base, answers=answers | {"max_tokens": 1}).params
    promoted, checks, _ = ask(checkout, checkout.good)
    assert checks["answers end"]["found"] == "0 of 6 do"
    assert not promoted


def test_two_at_once_wait_for_each_other(checkout):
    said = []
    with checkout.registry.one_at_a_time(print):
        thread = threading.Thread(target=ask, args=(checkout, checkout.good, said))
        thread.start()
        while not said:
            time.sleep(0.05)
        assert registry.verdict(checkout.good) is None
    thread.join()
    assert said[0] == "another promotion is under way; waiting for it"
    assert checkout.registry.champion() == checkout.good


def test_lineage_leads_from_any_file_to_the_rows(checkout):
    ask(checkout, checkout.good)
    rows = dialogues(400, 1, shuffled=0.3)
    source = json.loads((checkout.good.folder / stage.MANIFEST).read_text())["source"]
    for name in (
        "1",
        "champion",
        checkout.good.merged[:8],
        str(checkout.good.model),
        str(checkout.good.folder / stage.ADAPTER),
    ):
        found = lineage.trace(checkout.root, name)
        assert (found.steps["model"]["version"], found.steps["model"]["aliases"]) == (1, "champion")
        assert found.steps["model"]["gate"].startswith("passed")
        (adapter,) = found.steps["adapters"]
        assert adapter["sha256"] == checkout.good.files["outputs/train/adapter.pth"]
        assert found.steps["base"]["sha256"] == sha256(checkout.base)
        assert found.steps["base"]["is"] == "here"
        assert (adapter["data"]["sha256"], adapter["data"]["rows"]) == (source["sha256"], 400)
        assert adapter["training"]["params"]["data"]["tokenizer"] == "bytes"
        told = list(lineage.rows(found))
        for side in ("train", "valid"):
            wanted = [row["text"] for row in rows if is_held_out(row) == (side == "valid")]
            assert [row["text"] for row in told if row["side"] == side] == wanted
    assert any("git commit: none" in line for line in lineage.lines(found))


def test_lineage_of_a_file_elsewhere_and_of_one_that_nothing_knows(checkout, tmp_path):
    """With no registry, no outputs: its receipt and the adapter it names tell."""
    adapter = shutil.copyfile(checkout.good.folder / stage.ADAPTER, tmp_path / "adapter.pth")
    shutil.rmtree(checkout.registry.folder)
    shutil.rmtree(checkout.root / "outputs")
    out = tmp_path / "own.pth"
    receipt = merge(checkout.base, [Part(adapter)], out)
    write_json(tmp_path / "own.pth.receipt.json", receipt)
    found = lineage.trace(tmp_path, "own.pth")
    (entry,) = found.steps["adapters"]
    assert entry["file"] == str(adapter)
    assert entry["training"]["run"] == receipt["adapters"][0]["run"]
    assert entry["data"]["rows kept"] == "no"
    assert found.steps["base"]["is"] == "here"
    with pytest.raises(InputError, match="are not kept here"):
        list(lineage.rows(found))
    out.write_bytes(out.read_bytes() + b"x")
    steps = lineage.trace(tmp_path, "own.pth").steps
    assert steps["model"]["made from"].startswith("not known")
    assert "is of another file" in steps["model"]["receipt"]
    with pytest.raises(InputError, match="nothing: no file and no registered version"):
        lineage.trace(tmp_path, "nothing")
