"""Compiles `csrc` once per machine and source, into the user's cache folder, and loads it.

The sources are C++17 behind a plain C ABI: no header of torch, so a build takes seconds and outlives torch's versions.
Without a compiler there is one warning, and the operators run in torch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"

FLAGS = "-O3 -march=native -std=c++17 -fPIC -fopenmp -ffp-contract=fast -Wall -Wextra -Wno-psabi"
"""-ffp-contract=fast is GCC's default, and makes Clang fuse products and sums as GCC does."""

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order where $CXX names none. GCC's OpenMP runtime is the one that torch brings."""

_NINJA = """\
rule compile
  command = {cxx} {flags} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = {cxx} {flags} -shared $in -o $out
{objects}
build rwkv.so: link {names}
"""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled operators, built now if this machine has not built these sources before; None if it can't.

    The reason is then a warning, given once. Calls from several processes at once are safe: each builds in a folder of
    its own, the first to finish puts it in place, and all use that one.
    """
    try:
        compiler = _compiler()
        path = _cache() / _key(compiler) / "rwkv.so"
        if not path.exists():
            _build(compiler, path.parent)
        return _load(path)
    except RuntimeError as error:
        warnings.warn(f"{error}; until then RWKV runs on this CPU in torch, several times slower", stacklevel=2)
        return None


def available() -> bool:
    """Whether `library` is there."""
    return library() is not None


# torch.compile takes the answer, rather than to trace how it was found. `torch.compiler.assume_constant_result` sets
# just this, but imports all of the compiler for it.
available.__dict__["_dynamo_marked_constant"] = True


@functools.cache
def function(name: str, fields: str) -> Callable[..., None]:
    """A function of the library, which must be `available`.

    In C it takes one pointer to a record of fields of 8 bytes each: ctypes would take 0.2 us to convert each argument, and a
    token is hundreds of arguments.

    Args:
        name: its name in C.
        fields: of the record, as `struct` has them: q an int64_t or an address, d a double.
    """
    found = getattr(library(), name)
    found.argtypes, found.restype = [ctypes.c_char_p], None
    pack = struct.Struct(fields).pack

    def call(*values: float) -> None:
        found(pack(*values))

    return call


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    tried = f"$CXX={named[0]}" if named else ", ".join(COMPILERS)
    raise RuntimeError(f"no C++ compiler is here (looked for {tried}); install g++, or set $CXX to one")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv-flow"


def _processor() -> str:
    """What -march=native looks at: a home folder may be shared by machines that differ in it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if file.exists() else []
    names = ("model", "stepping", "cpu family", "model name", "flags", "Features", "CPU part")
    told = [line for line in lines if line.split("\t")[0].strip() in names]
    return "\n".join((platform.machine(), platform.processor(), *told))


def _key(compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256("\n".join((*compiler, version, FLAGS, _NINJA, _processor())).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))  # torch is imported, so the loader takes its libgomp.so.1 for ours
    except OSError as error:
        raise RuntimeError(f"{error}; delete {path.parent}, to build it anew") from error


def _build(compiler: list[str], folder: Path) -> None:
    """Make `folder`, whole or not at all.

    Raises:
        RuntimeError: the compiler failed, or the folder can't be written.
    """
    files = sorted(SOURCES.glob("*.cpp"))
    text = _NINJA.format(
        cxx=shlex.join(compiler).replace("$", "$$"),
        flags=FLAGS,
        objects="\n".join(f"build {file.stem}.o: compile {_escaped(file)}" for file in files),
        names=" ".join(f"{file.stem}.o" for file in files),
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder.parent) as temporary:
            made = Path(temporary) / "library"
            made.mkdir()
            (made / "build.ninja").write_text(text, encoding="utf-8")
            command = [sys.executable, "-m", "ninja", "-C", str(made), "rwkv.so"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
                raise RuntimeError(
                    f"`{shlex.join(command)}` failed:\n{said}\ninstall ninja (pip install ninja) and a C++17 compiler with "
                    "OpenMP such as g++ 9 or later, or set $CXX to one"
                )
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, and its build is as good
                    raise
    except OSError as error:
        raise RuntimeError(f"{error}: the build needs a folder to write; set $XDG_CACHE_HOME to one") from error


def _escaped(file: Path) -> str:
    """A path as build.ninja wants it."""
    return str(file).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def threads() -> int:
    """How many threads an operator may use: as many as torch does."""
    return torch.get_num_threads()
