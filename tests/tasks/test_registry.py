"""The registry's files: what is kept of a model, and who is champion. Its models are any bytes."""

import json
import subprocess
import sys

import pytest

from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import sha256
from tasks import registry, stage
from tasks.record import RunRecord
from tasks.registry import Registry


class Shop:
    """A checkout in which models are made of a word."""

    def __init__(self, root):
        self.root, self.registry, self.clock = root, Registry(root), 1000.0

    def make(self, model, *, state=None, rows="rows", adapter=None):
        """Train on rows, and merge."""
        self.clock += 1
        adapter = adapter or f"adapter of {model}"
        for name, text in {
            "data/train.bin": f"{rows} learned", "data/valid.bin": f"{rows} held out", "data/manifest.json": "{}",
            "train/adapter.pth": adapter, "merged/model.pth": model, "merged/receipt.json": f'"{model}"',
        }.items():  # fmt: skip
            self.write(name, text)
        (self.root / stage.STATE).unlink(missing_ok=True)
        if state:
            self.write("merged/state.pth", state)
        files = {name: sha256(self.root / stage.DATA / name) for name in ("train.bin", "valid.bin")}
        made = RunRecord.fresh(
            self.root, digest="d", started=self.clock, params={}, base={"sha256": "b" * 64}, data={"files": files}
        )
        made.write(self.root / stage.TRAIN)
        return self.register()

    def register(self):
        record = RunRecord.read(self.root / stage.TRAIN)
        hashes = {
            name: sha256(self.root / path) if (self.root / path).exists() else None
            for name, path in {"adapter": stage.ADAPTER, "merged": stage.MODEL, "state": stage.STATE}.items()
        }
        places = (
            "data/manifest.json",
            "train/adapter.pth",
            "train/run.json",
            "merged/receipt.json",
            "evaluate/metrics.json",
        )
        outputs = self.root / "outputs"
        files = {place: (outputs / place, sha256(outputs / place)) for place in places if (outputs / place).exists()}
        self.registry.register(self.root, record, hashes, files, sha256)
        return next(
            (v for v in self.registry.versions() if v.merged == hashes["merged"] and v.state == hashes["state"]), None
        )

    def write(self, name, text):
        path = self.root / "outputs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # as the stages do: never in place
        path.write_text(text)

    def promote(self, version):
        self.registry.promote(version, None)


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


def names(versions):
    return [version.model.read_text() for version in versions]


def test_each_model_is_one_version_with_all_its_files(shop):
    shop.make("first")
    shop.make("second", state="a state")
    shop.make("first", state="a state")
    versions = shop.registry.versions()
    assert [v.number for v in versions] == [1, 2, 3]
    assert names(versions) == ["first", "second", "first"]
    assert (versions[1].folder / stage.STATE).read_text() == "a state"
    assert not (versions[0].folder / stage.STATE).exists()
    assert versions[0].key == versions[0].merged[:12]
    assert versions[2].key == f"{versions[2].merged[:12]}-{versions[2].state[:12]}"
    for version in versions:
        assert version.files
        assert {name: sha256(version.folder / name) for name in version.files} == version.files
        assert version.has_rows


def test_files_are_second_names_and_stay_when_the_outputs_go(shop):
    version = shop.make("model")
    assert version.model.samefile(shop.root / stage.MODEL)
    assert (version.folder / "outputs/data/train.bin").samefile(shop.root / "outputs/data/train.bin")
    shop.make("another", rows="other rows")
    assert version.model.read_text() == "model"
    assert (version.folder / "outputs/data/train.bin").read_text() == "rows learned"


def test_registering_again_changes_nothing_and_later_stages_add(shop):
    version = shop.make("model")
    before = {path: path.stat().st_mtime_ns for path in version.folder.rglob("*")}
    assert shop.register() == version
    assert {path: path.stat().st_mtime_ns for path in version.folder.rglob("*")} == before
    shop.write("evaluate/metrics.json", "{}")
    assert set(shop.register().files) - set(version.files) == {"outputs/evaluate/metrics.json"}
    assert shop.registry.versions()[0].number == 1


def test_rows_that_nothing_was_trained_on_are_not_the_model_s(shop):
    version = shop.make("model")
    shop.write("data/train.bin", "prepared anew")
    shop.write("data/manifest.json", '{"prepared": "anew"}')
    assert shop.register().files == version.files  # those that were trained on are kept
    assert (version.folder / "outputs/data/manifest.json").read_text() == "{}"
    shop.write("merged/model.pth", "merged after that")
    other = shop.register()
    assert not other.has_rows
    assert not any(name.startswith("outputs/data") for name in other.files)


def test_a_version_is_found_by_number_alias_and_hash(shop):
    with pytest.raises(InputError, match=r"candidate: no file and no registered version .* registered are none"):
        shop.registry.find("candidate")
    first, second = shop.make("first"), shop.make("second", state="state")
    found = ["1", first.merged, first.merged[:6], sha256_of_adapter(first), "2", second.state[:10], "candidate"]
    assert [shop.registry.find(name).number for name in found] == [1, 1, 1, 1, 2, 2, 2]
    for wrong in ("3", "0", "champion", "", "ffffffffffff", first.merged[:5]):
        with pytest.raises(InputError, match=r"registered are 1 \("):
            shop.registry.find(wrong)
    third = shop.make("first", state="state")
    with pytest.raises(InputError, match="2 versions begin so; give its number"):
        shop.registry.find(third.merged)


def sha256_of_adapter(version):
    return version.files["outputs/train/adapter.pth"][:20]


def test_the_candidate_is_what_was_trained_last(shop):
    assert shop.registry.candidate() is None
    shop.make("first")
    shop.make("second")
    assert names([shop.registry.candidate()]) == ["second"]
    shop.make("first")  # again, from another training
    assert names([shop.registry.candidate()]) == ["first"]
    assert len(shop.registry.versions()) == 2


def test_rollback_goes_back_one_champion_at_a_time(shop):
    a, b, c = (shop.make(name) for name in "abc")
    assert shop.registry.champion() is None
    for version in (a, b, c):
        shop.promote(version)
    assert shop.registry.champion() == c
    assert shop.registry.rollback() == (c.key, b)
    assert shop.registry.champion() == b
    assert shop.registry.rollback() == (b.key, a)
    assert shop.registry.champion() == a
    with pytest.raises(InputError, match="is the first champion"):
        shop.registry.rollback()
    assert shop.registry.champion() == a
    shop.promote(c)
    assert shop.registry.rollback() == (c.key, a)
    assert [change.by for change in shop.registry.changes()] == ["promote"] * 3 + ["rollback"] * 2 + [
        "promote",
        "rollback",
    ]
    assert [change.version for change in shop.registry.changes()] == [v.key for v in (a, b, c, b, a, c, a)]


def test_without_a_champion_there_is_nothing_to_go_back_to(shop):
    shop.make("a")
    with pytest.raises(InputError, match="there is no champion"):
        shop.registry.rollback()


def test_a_champion_whose_files_are_gone_is_said_and_can_be_rolled_back(shop):
    a, b = shop.make("a"), shop.make("b")
    shop.promote(a)
    shop.promote(b)
    b.folder.rename(shop.root / "elsewhere")
    with pytest.raises(WorldError, match="the champion's files are gone"):
        shop.registry.champion()
    assert shop.registry.rollback()[1] == a


def test_damage_is_seen(shop):
    version = shop.make("model", state="state")
    assert version.damage() is None
    version.model.write_text("mode1")
    assert version.damage() == "outputs/merged/model.pth has other bytes than were registered"
    version.model.unlink()
    assert version.damage() == "outputs/merged/model.pth is missing"


def test_a_file_that_is_no_version_is_said(shop):
    version = shop.make("model")
    (version.folder / "version.json").write_text("{")
    with pytest.raises(InputError, match="is not a version's"):
        shop.registry.versions()


def test_processes_change_the_champion_one_after_the_other(shop):
    """Four read how long the history is, wait, and add to it: without the lock some would be lost."""
    version = shop.make("model")
    code = (
        "import sys, time; from pathlib import Path; from tasks.registry import Registry;"
        "registry = Registry(Path(sys.argv[1]));\n"
        "with registry.one_at_a_time(lambda text: print(text, flush=True)):\n"
        "    before = len(registry.changes()); time.sleep(0.2)\n"
        "    registry.promote(registry.versions()[0], sys.argv[2])\n"
        "    assert len(registry.changes()) == before + 1\n"
    )
    with shop.registry.one_at_a_time(print):
        started = [
            subprocess.Popen([sys.executable, "-c", code, shop.root, str(i)], stdout=subprocess.PIPE, text=True)
            for i in range(4)
        ]
        said = [process.stdout.readline() for process in started]
        assert shop.registry.changes() == []
    assert [process.wait() for process in started] == [0] * 4
    assert said == ["another promotion is under way; waiting for it\n"] * 4
    changes = shop.registry.changes()
    assert sorted(change.flow_run for change in changes) == list("0123")
    assert {change.version for change in changes} == {version.key}


def test_a_verdict_is_a_file(shop):
    version = shop.make("model")
    assert registry.verdict(version) is None
    (version.folder / registry.VERDICT).write_text(json.dumps({"passed": True}))
    assert registry.verdict(version) == {"passed": True}
