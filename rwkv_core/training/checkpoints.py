"""The files that a run is continued from: written whole, each ending with its own digest, the one before kept.

A checkpoint is taken between two optimizer steps, so that no accumulation is half done. It holds, in Lightning's layout, what
is trained, optimizer, schedule, the scaler of half precision, the number of steps, the history and the lanes' states; beside
these the digest that the run's folder is named after, the run's id, and the states of all random generators. The place in the
data, the learning rate, dropout and every warm-up are functions of seed and step: nothing of them is stored.
"""

import errno
import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from rwkv_core.errors import InputError
from rwkv_core.files import sha256, whole_file, whole_folder, write_json

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""The newest checkpoint of a run, and the one before it. With DeepSpeed each is a folder."""

SUMMARY = "run.ckpt"
"""In a checkpoint that is a folder: what another one has as a file, but for the optimizer's shards."""

_DIGESTS = "sha256.json"
"""In it: of every other file."""

_WORD = b"sha256 "
_TRAILER = len(_WORD) + 64 + 1  # the digest in hexadecimal, and a line's end
_BLOCK = 1 << 20  # bytes read at a time; and from which on a digest is worth a thread


def latest(folder: Path) -> tuple[Path | None, int]:
    """The checkpoint that a run continues from and the steps that it has done; None and 0 where there is none.

    A file whose digest is not that of its bytes is set aside as *.refused, and the one before it is taken: of whatever is lost,
    stderr says what. With no whole one left the run begins anew, which loses time alone: it has no other result.

    Raises:
        InputError: the checkpoint is whole and of another run, which nothing here may replace.
    """
    refused = False
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        if not intact(path):
            aside = path.with_name(f"{path.name}.refused")
            remove(aside)
            path.replace(aside)
            print(f"{path}: its bytes are not those that were written; kept as {aside.name}", file=sys.stderr)
            refused = True
            continue
        saved = torch.load(summary(path), weights_only=True, mmap=True)
        if saved["digest"] != folder.name:
            raise InputError(
                str(path),
                f"is of the run {saved['digest']}, whose settings, base or data are others than those of {folder.name}",
                f"move it to {folder.with_name(saved['digest'])}, or away",
            )
        steps = int(saved["global_step"])
        print(f"continuing after step {steps} ({path})", flush=True)
        return path, steps
    if refused:
        print(f"{folder}: no checkpoint is whole; this run begins anew", file=sys.stderr, flush=True)
    return None, 0


def exist(folder: Path) -> bool:
    """Whether there is something to continue from, whole or not."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def run_id(folder: Path) -> str | None:
    """The id of the run whose checkpoints lie here; None where no whole one says it."""
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists() and intact(path):
            found: str | None = torch.load(summary(path), weights_only=True, mmap=True)["run"]
            return found
    return None


def summary(path: Path) -> Path:
    """The file of a checkpoint that has its step, what is trained, and the history."""
    return path / SUMMARY if path.is_dir() else path


def save(folder: Path, write: Callable[[Path], None], *, first: bool = True, shared: bool = False) -> None:
    """Let `write` make the newest checkpoint; the one that was becomes the previous one. At each instant one is whole.

    Args:
        folder: the run's.
        write: makes it at a path, with the other processes of the run, each of which calls this.
        first: this process is the one of them that puts it into place.
        shared: it is a folder, into which all of them write.

    Raises:
        WorldError: the disk is full or not writable; both are as they were.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not first:
        write(last)  # Lightning takes the first one's path, and has this one write beside it or not at all
        return
    with (whole_folder if shared else whole_file)(last) as temporary:
        write(temporary)
        if shared:
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            write_json(temporary / _DIGESTS, {str(path.relative_to(temporary)): sha256(path) for path in files})
        if last.exists():
            remove(previous)
            last.replace(previous)


def remove(path: Path) -> None:
    """A checkpoint, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def forget(folder: Path) -> None:
    """Remove the checkpoints: the run has left its result. The newest goes last, for it has nothing left to learn."""
    for name in (f"{LAST}.refused", f"{PREVIOUS}.refused", PREVIOUS, LAST):
        remove(folder / name)


def intact(path: Path) -> bool:
    """Whether the file ends with the digest of what is before it, or of a folder each file has its own. A place of the disk
    that can't be read is no.
    """
    if path.is_dir():
        digests = path / _DIGESTS
        known: dict[str, str] = json.loads(digests.read_text(encoding="utf-8")) if digests.exists() else {}
        return bool(known) and all((path / name).exists() and sha256(path / name) == known[name] for name in known)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            left = path.stat().st_size - _TRAILER
            while left > 0:
                block = file.read(min(left, _BLOCK))
                if not block:
                    return False
                digest.update(block)
                left -= len(block)
            return left == 0 and file.read() == _trailer(digest.hexdigest())
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return False


class CheckpointFile(TorchCheckpointIO):
    """Lightning's way of writing, with the digest at the end, and without its copies of the whole file in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it, in place: inside `save`."""
        with Path(path).open("wb") as file, _Digesting(file) as digesting:
            torch.save(checkpoint, digesting)  # type: ignore[arg-type]  # it wants write and flush alone
            file.write(_trailer(digesting.hexdigest()))


class _Digesting:
    """A file that notes the digest of what is written: of large blocks while they are, in a thread beside."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self._beside = ThreadPoolExecutor(1)

    def __enter__(self) -> "_Digesting":
        return self

    def __exit__(self, *error: object) -> None:
        self._beside.shutdown()

    def write(self, block: memoryview) -> int:
        if len(block) < _BLOCK:
            self._digest.update(block)
            return self._file.write(block)
        digested = self._beside.submit(self._digest.update, block)
        try:
            return self._file.write(block)
        finally:
            digested.result()

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def random_states() -> dict[str, Any]:
    """Of all generators that anything in a step may draw from."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on from `random_states`; GPUs that are not here any more are passed over."""
    version, values, gauss = states["python"]
    random.setstate((version, tuple(values), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state.cpu(), device)


def _trailer(digest: str) -> bytes:
    return _WORD + digest.encode() + b"\n"
