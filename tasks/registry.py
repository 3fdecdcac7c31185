"""The registry: every merged model with all that it was made from and judged by, which is the champion, and which were before.

It is files in the main checkout, and MLflow's registry is a view of them. A version's folder is laid out as a checkout is, so
whatever reads a checkout's outputs reads those of a version.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from rwkv_core.errors import InputError, WorldError
from rwkv_core.files import link, sha256, whole_file
from tasks import stage
from tasks.record import RunRecord

FOLDER = Path(".rwkvflow/registry")
"""Below the main checkout: what experiments' and worktrees' copies made must outlive them."""

VERDICT = "verdict.json"
"""Name of what the gate last said of a version, in its folder; verdict.md is the same to read."""

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: the newest version, and the one that is in use."""

_VERSION, _CHAMPIONS = "version.json", "champions.json"


class Change(BaseModel):
    """The champion became another version."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    time: float
    """Seconds since 1970."""

    by: Literal["promote", "rollback"]

    version: str
    """Key of the new champion."""

    flow_run: str | None = None
    """Prefect's id, if a flow did it."""


class Version(BaseModel):
    """A merged model, and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    folder: Path = Field(exclude=True)
    """Where its files are: outputs/merged/model.pth, outputs/data, ... in it."""

    number: int
    """1 for the first that was registered here."""

    merged: str
    """sha256 of the checkpoint."""

    state: str | None
    """sha256 of the tuned state beside it."""

    files: dict[str, str]
    """sha256 of each file, by its path in the folder."""

    @property
    def key(self) -> str:
        """Name of its folder."""
        return self.folder.name

    @cached_property
    def record(self) -> RunRecord:
        """Of the training that made it."""
        return RunRecord.read(self.folder / stage.TRAIN)

    @property
    def model(self) -> Path:
        """The checkpoint."""
        return self.folder / stage.MODEL

    @property
    def has_rows(self) -> bool:
        """Whether the token files it was trained and judged on are kept: those that were there when it was merged."""
        return (stage.DATA / "train.bin").as_posix() in self.files

    def digests(self) -> list[str]:
        """Of the checkpoint, its state, and the adapter."""
        adapter = self.files.get(stage.ADAPTER.as_posix())
        return [digest for digest in (self.merged, self.state, adapter) if digest]

    def damage(self) -> str | None:
        """What is wrong with the model's own files: one is missing, or has other bytes than were registered."""
        for name, digest in self.files.items():
            path = self.folder / name
            if Path(name).parent == stage.MERGED and path.suffix == ".pth":
                if not path.exists():
                    return f"{name} is missing"
                if sha256(path) != digest:
                    return f"{name} has other bytes than were registered"
        return None


class Registry:
    """The registry of a checkout.

    Args:
        main: the main checkout.
    """

    def __init__(self, main: Path) -> None:
        self.folder = main / FOLDER

    def versions(self) -> list[Version]:
        """All there are, by number."""
        found = [_read(path.parent) for path in self.folder.glob(f"*/{_VERSION}")]
        return sorted(found, key=lambda version: version.number)

    def candidate(self) -> Version | None:
        """The one whose training began last."""
        return max(self.versions(), key=lambda v: (v.record.started, v.number), default=None)

    def champion(self) -> Version | None:
        """The one that is in use; None before the first promotion.

        Raises:
            WorldError: its files are gone.
        """
        stack = self._stack()
        if not stack:
            return None
        folder = self.folder / stack[-1]
        if not (folder / _VERSION).exists():
            raise WorldError(
                str(folder), "the champion's files are gone", "bring the folder back, or `rwkvflow rollback`"
            )
        return _read(folder)

    def changes(self) -> list[Change]:
        """All that was ever promoted and rolled back, the oldest first."""
        try:
            text = (self.folder / _CHAMPIONS).read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [Change.model_validate(entry) for entry in json.loads(text)]

    def find(self, name: str) -> Version:
        """The version of a number, an alias, or the beginning of the sha256 of its checkpoint, state or adapter.

        Raises:
            InputError: there is none, or several.
        """
        versions = self.versions()
        if name == CANDIDATE:
            found = [v for v in (self.candidate(),) if v]
        elif name == CHAMPION:
            found = [v for v in (self.champion(),) if v]
        elif name.isdecimal() and len(name) < 8:
            found = [v for v in versions if v.number == int(name)]
        else:
            found = [v for v in versions if len(name) >= 6 and any(h.startswith(name) for h in v.digests())]
        if len(found) == 1:
            return found[0]
        there = ", ".join(f"{v.number} ({v.merged[:12]})" for v in versions) or "none"
        if found:
            raise InputError(name, f"{len(found)} versions begin so", f"give its number; registered are {there}")
        raise InputError(
            name, f"no file and no registered version has this name; registered are {there}", "give one of them"
        )

    def register(
        self,
        root: Path,
        record: RunRecord,
        hashes: Mapping[str, str | None],
        files: Mapping[str, tuple[Path, str]],
        digest: Callable[[Path], str],
    ) -> None:
        """Keep the merged model of a checkout and what it was made from; or what its later stages have added.

        The files are second names of the outputs' bytes, so they take no room as long as the outputs are there.

        Args:
            root: the checkout.
            record: outputs/train/run.json.
            hashes: sha256 of "adapter", "merged" and "state".
            files: of its stages' outputs, as `mirror.files` names them, each with its sha256.
            digest: sha256 of a file.
        """
        merged, state = hashes["merged"], hashes["state"]
        if merged is None:
            return
        key = "-".join(each[:12] for each in (merged, state) if each)
        rows = _rows(root, record, digest)
        wanted = {
            _place(place): entry
            for place, entry in files.items()
            if rows
            or not place.startswith(("data/", "preview/"))  # other rows than it was trained on may lie there now
        } | rows
        for path in sorted((root / stage.MERGED).glob("*.pth")):
            wanted[(stage.MERGED / path.name).as_posix()] = (
                path,
                merged if path.name == stage.MODEL.name else digest(path),
            )
        folder = self.folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock"):
            known = _read(folder) if (folder / _VERSION).exists() else None
            kept = dict(known.files) if known else {}
            # token files stay when others lie in the outputs by now; all else is as the outputs have it
            stays = {} if rows else {name: sha for name, sha in kept.items() if name.startswith(f"{stage.DATA}/")}
            digests = stays | {name: sha for name, (_, sha) in wanted.items()}
            if known and digests == kept:
                return
            for name, (path, sha) in wanted.items():
                if kept.get(name) != sha or not (folder / name).exists():
                    link(path, folder / name)
            number = known.number if known else max((v.number for v in self.versions()), default=0) + 1
            version = Version(folder=folder, number=number, merged=merged, state=state, files=digests)
            with whole_file(folder / _VERSION) as temporary:
                temporary.write_text(version.model_dump_json(indent=1) + "\n", encoding="utf-8")
            for name in kept.keys() - digests.keys():
                (folder / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def one_at_a_time(self, say: Callable[[str], None]) -> Iterator[None]:
        """Hold the champion as it is: who would change it waits.

        Args:
            say: is told that another does it now.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "champion.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say("another promotion is under way; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def promote(self, version: Version, flow_run: str | None) -> None:
        """Make a version the champion; the caller holds `one_at_a_time`."""
        self._append(Change(time=time.time(), by="promote", version=version.key, flow_run=flow_run))

    def rollback(self) -> tuple[str, Version]:
        """Make the champion what it was before the last promotion that is not undone; the caller holds `one_at_a_time`.

        Returns:
            Key of the champion until now, and the new champion.

        Raises:
            InputError: there was none before.
            WorldError: its files are gone.
        """
        stack = self._stack()
        if len(stack) < 2:
            now = f"{stack[-1]} is the first champion" if stack else "there is no champion"
            raise InputError(
                now, "there is none before it to go back to", "promote a version: rwkvflow promote VERSION"
            )
        was, before = stack[-1], self.folder / stack[-2]
        if not (before / _VERSION).exists():
            raise WorldError(str(before), "the files of the champion before are gone", "bring the folder back")
        self._append(Change(time=time.time(), by="rollback", version=before.name))
        return was, _read(before)

    def _append(self, change: Change) -> None:
        text = json.dumps([entry.model_dump() for entry in (*self.changes(), change)], indent=1)
        with whole_file(self.folder / _CHAMPIONS) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def _stack(self) -> list[str]:
        """Keys of the champions that a rollback goes through, the present one last."""
        stack: list[str] = []
        for change in self.changes():
            if change.by == "promote":
                stack.append(change.version)
            else:
                stack.pop()
        return stack


def verdict(version: Version) -> dict[str, Any] | None:
    """What the gate last said of a version; None if it was never asked."""
    try:
        found: dict[str, Any] = json.loads((version.folder / VERDICT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def _read(folder: Path) -> Version:
    try:
        return Version(folder=folder, **json.loads((folder / _VERSION).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InputError(
            str(folder / _VERSION), "is not a version's", "move the folder away, and `rwkvflow sync`"
        ) from None


def _rows(root: Path, record: RunRecord, digest: Callable[[Path], str]) -> dict[str, tuple[Path, str]]:
    """The token files of a checkout, if they are what was trained on, to the byte."""
    named: dict[str, str] = record.data.get("files", {})
    paths = {name: root / stage.DATA / name for name in named}
    if not all(path.exists() and digest(path) == named[name] for name, path in paths.items()):
        return {}
    return {(stage.DATA / name).as_posix(): (path, named[name]) for name, path in paths.items()}


def _place(place: str) -> str:
    """Where an artifact's file is in a checkout."""
    return place.removeprefix("pipeline/") if place.startswith("pipeline/") else f"{stage.OUTPUTS}/{place}"
