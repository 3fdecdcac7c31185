"""A checkpoint may be in several files: parts that are numbered, or that an index names.

Source of the index: Hugging Face's save_pretrained, model.safetensors.index.json and pytorch_model.bin.index.json.
"""

import json
import re
from pathlib import Path

from rwkv_core.errors import InputError
from rwkv_core.formats.container import SUFFIXES

_INDEX = ".index.json"
_USUAL = ("model.safetensors", "pytorch_model.bin")  # a trainer's folder has more beside these
_NUMBERED = re.compile(r"(?P<before>.+[-_.])(?P<number>\d+)(?P<of>[-_.]?of[-_.]?)(?P<total>\d{1,5})(?P<suffix>\.\w+)")


def find(path: Path) -> tuple[list[Path], set[str]]:
    """The files that make up the checkpoint at `path`: a file, an index, one of its parts, or a folder with either.

    Returns:
        The files, in order, and the names that the index promises, none if there is no index.

    Raises:
        InputError: there is nothing, more than one checkpoint, a part is missing, or the index can't be read.
    """
    if path.is_dir():
        return find(_in_folder(path))
    if path.name.endswith(_INDEX):
        return _indexed(path)
    found = _NUMBERED.fullmatch(path.name)
    return ([path] if found is None else _numbered(path, found)), set()


def _in_folder(folder: Path) -> Path:
    for name in _USUAL:
        for path in (folder / name, folder / (name + _INDEX)):
            if path.is_file():
                return path
    here = sorted(path for path in folder.iterdir() if path.is_file())
    indexes = [path for path in here if path.name.endswith(_INDEX)]
    # one file stands for all that are numbered alike
    alone = {_NUMBERED.sub(r"\g<before>\g<total>\g<suffix>", p.name): p for p in here if p.suffix in SUFFIXES}
    found = indexes or list(alone.values())
    if not found:
        raise InputError(f"{folder}", "no checkpoint is there", "give the model file, or the folder that has it")
    if len(found) > 1:
        some = ", ".join(path.name for path in found[:3])
        raise InputError(f"{folder} has {some}", "it must hold one checkpoint", "give one of the files")
    return found[0]


def _numbered(path: Path, found: re.Match[str]) -> list[Path]:
    number, total = found["number"], int(found["total"])
    width = len(number)

    def part(i: int) -> Path:
        return path.with_name(f"{found['before']}{i:0{width}}{found['of']}{found['total']}{found['suffix']}")

    first = 0 if part(0).is_file() else 1
    return _all_there(path, [part(i) for i in range(first, first + total)])


def _indexed(path: Path) -> tuple[list[Path], set[str]]:
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(where.values()))
    except OSError:
        raise InputError(str(path), "no index is there", "correct the path, or download the model to it") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        files = []
    plain = all(isinstance(name, str) and name not in ("", ".", "..") and "/" not in name for name in files)
    if not files or not plain:
        raise InputError(f"{path}", "must map the names of tensors to files beside it", "download it again")
    return _all_there(path, [path.with_name(name) for name in files]), set(where)


def _all_there(path: Path, files: list[Path]) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"{path}: of {len(files)} parts, {listed} missing", "all must be there", "download the rest")
    return files
