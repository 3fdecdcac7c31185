"""Compiles `csrc` once per machine and source, into the user's cache folder, and loads it.

The sources are C++17 and CUDA behind a plain C ABI: no header of torch, so a build takes seconds and outlives torch's
versions. Each source is a library of its own, made when it is first asked for. Without a compiler there is one warning for
each, and the operators run in another form.
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
from typing import Literal

import torch

Kind = Literal["cpu", "cuda", "host"]
"""What a library is made of, and for: csrc/*.cpp for the CPU; csrc/cuda/*.cu for an NVIDIA GPU; and the same for the CPU, as
csrc/cuda/device.h lets it run there, slowly: the tests prove the CUDA code by it where there is no GPU."""

SOURCES = Path(__file__).parent / "csrc"

FLAGS = "-O3 -std=c++17 -fPIC -fopenmp -ffp-contract=fast -Wall -Wextra -Wno-psabi"
"""-ffp-contract=fast is GCC's default, and makes Clang fuse products and sums as GCC does."""

LEVELS = {
    "AVX512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512",
    "AVX2": "-mavx2 -mfma",
}
"""By what torch says of the processor, which $ATEN_CPU_CAPABILITY overrides; on any other, what the compiler takes for
granted: NEON on ARM."""

HOST_FLAGS = "-x c++ -O2 -std=c++17 -fPIC -DRWKV_HOST -Wall -Wextra -Wno-unknown-pragmas"

CUDA_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC"

COMPILERS = ("c++", "g++", "clang++")
"""Tried in this order where $CXX names none. GCC's OpenMP runtime is the one that torch brings."""

CUDA_HOMES = ("/usr/local/cuda",)
"""Where nvcc is looked for beside $PATH and $CUDA_HOME."""

_NINJA = """\
rule compile
  command = {compile} -c $in -o $out
rule link
  command = {link} -shared $in -o $out {libraries}
build {name}.o: compile {source}
build {name}.so: link {name}.o
"""


@functools.cache
def library(source: str, kind: Kind = "cpu") -> ctypes.CDLL | None:
    """A compiled source, built now if this machine has not built it before; None if it can't.

    The reason is then a warning, given once. Calls from several processes at once are safe: each builds in a folder of
    its own, the first to finish puts it in place, and all use that one.

    Args:
        source: the file's name, without its ending.
        kind: which file, and what for.
    """
    try:
        command = _command(kind)
        path = cache() / _key(source, kind, command) / f"{source}.so"
        if not path.exists():
            _build(source, kind, command, path.parent)
        return _load(path)
    except RuntimeError as error:
        then = "on this GPU in Triton or torch" if kind == "cuda" else "on this CPU in torch"
        warnings.warn(f"{error}; until then {source} runs {then}, several times slower", stacklevel=2)
        return None


def available(source: str, kind: Kind = "cpu") -> bool:
    """Whether `library` is there."""
    return library(source, kind) is not None


# torch.compile takes the answer, rather than to trace how it was found. `torch.compiler.assume_constant_result` sets
# just this, but imports all of the compiler for it.
available.__dict__["_dynamo_marked_constant"] = True


@functools.cache
def function(source: str, name: str, fields: str, kind: Kind = "cpu") -> Callable[..., None]:
    """A function of a library, which must be `available`.

    In C it takes one pointer to a record of fields of 8 bytes each: ctypes would take 0.2 us to convert each argument, and a
    token is hundreds of arguments. On a GPU it returns a cudaError_t.

    Args:
        source: of the library.
        name: its name in C.
        fields: of the record, as `struct` has them: q an int64_t or an address, d a double.
        kind: of the library.

    Raises:
        RuntimeError: by the function that is returned, if CUDA refuses.
    """
    found = getattr(library(source, kind), name)
    found.argtypes, found.restype = [ctypes.c_char_p], ctypes.c_int if kind != "cpu" else None
    pack = struct.Struct(fields).pack
    if kind == "cpu":

        def call(*values: float) -> None:
            found(pack(*values))

        return call

    def launch(*values: float) -> None:
        error = found(pack(*values))
        if error:
            describe = library(source, kind).rwkv_error_string  # type: ignore[union-attr]
            describe.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {describe(error).decode()} (CUDA error {error})")

    return launch


def _command(kind: Kind) -> tuple[list[str], list[str]]:
    """How to compile, and how to link.

    Raises:
        RuntimeError: there is no compiler.
    """
    if kind == "cuda":
        nvcc = _nvcc()
        return [*nvcc, *CUDA_FLAGS.split(), *_architectures()], nvcc
    compiler = _compiler()
    if kind == "host":
        return [*compiler, *HOST_FLAGS.split()], compiler
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    level = LEVELS.get(torch.backends.cpu.get_cpu_capability(), "") if x86 else ""
    return [*compiler, *FLAGS.split(), *level.split()], [*compiler, "-fopenmp"]


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    tried = f"$CXX={named[0]}" if named else ", ".join(COMPILERS)
    raise RuntimeError(f"no C++ compiler is here (looked for {tried}); install g++, or set $CXX to one")


def _nvcc() -> list[str]:
    homes = [f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), *CUDA_HOMES) if home]
    for found in (shutil.which("nvcc"), *(shutil.which("nvcc", path=home) for home in homes)):
        if found:
            return [found]
    raise RuntimeError("no nvcc is here; install the CUDA toolkit, or set $CUDA_HOME to where it is")


def _architectures() -> list[str]:
    """Of the GPUs that are present."""
    present = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    codes = [f"{major}{minor}" for major, minor in sorted(present)]
    return [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]


def cache() -> Path:
    """The user's folder of what was compiled."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv-flow"


def _file(source: str, kind: Kind) -> Path:
    return SOURCES / f"{source}.cpp" if kind == "cpu" else SOURCES / "cuda" / f"{source}.cu"


def _key(source: str, kind: Kind, command: tuple[list[str], list[str]]) -> str:
    version = subprocess.run([command[1][0], "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256("\n".join((*command[0], *command[1], version, _NINJA)).encode())
    file = _file(source, kind)
    for part in (file, *sorted(file.parent.glob("*.h"))):
        digest.update(part.name.encode() + b"\0" + (part.read_bytes() if part.exists() else b"") + b"\0")
    return f"{source}-{kind}-{digest.hexdigest()[:24]}"


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))  # torch is imported, so the loader takes its libgomp.so.1 for ours
    except OSError as error:
        raise RuntimeError(f"{error}; delete {path.parent}, to build it anew") from error


def _build(source: str, kind: Kind, command: tuple[list[str], list[str]], folder: Path) -> None:
    """Make `folder`, whole or not at all.

    Raises:
        RuntimeError: the compiler failed, or the folder can't be written.
    """
    compiling, linking = (shlex.join(part).replace("$", "$$") for part in command)
    # of itself a C compiler, which $CXX may be, leaves the library out, and what torch has loaded of it may not be seen
    libraries = "-lstdc++" if sys.platform == "linux" else ""
    text = _NINJA.format(
        compile=compiling, link=linking, libraries=libraries, name=source, source=_escaped(_file(source, kind))
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder.parent) as temporary:
            made = Path(temporary) / "library"
            made.mkdir()
            (made / "build.ninja").write_text(text, encoding="utf-8")
            ninja = [sys.executable, "-m", "ninja", "-C", str(made), f"{source}.so"]
            done = subprocess.run(ninja, capture_output=True, text=True)
            if done.returncode:
                said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
                needs = (
                    "a CUDA toolkit that fits the driver and the GPU, or set $CUDA_HOME to one"
                    if kind == "cuda"
                    else "a C++17 compiler with OpenMP such as g++ 9 or later, or set $CXX to one"
                )
                raise RuntimeError(
                    f"`{shlex.join(ninja)}` failed:\n{said}\ninstall ninja (pip install ninja) and {needs}"
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
