import functools
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kernels import build

ROOT = Path(__file__).parents[2]

NUMBER = 'extern "C" void number(long* x) { *x = 7; }\n'

LOAD = """
import sys
from pathlib import Path
from kernels import build
build.SOURCES = Path(sys.argv[1])
build.function("number", "number", "q")  # builds and loads
print(build.library("number")._name)
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A library of one small file, and a cache of its own."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "number.cpp").write_text(NUMBER)
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "rwkv-flow"


def fresh():
    return build.library.__wrapped__("number")


def key():
    return build._key("number", "cpu", build._command("cpu"))


def warning_of():
    """What the one warning says, where there is no library."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fresh() is None
    (warning,) = caught
    assert "until then number runs on this CPU in torch" in str(warning.message)
    return str(warning.message)


X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize("level", [*build.LEVELS, "DEFAULT"] if X86 else ["DEFAULT"])
@pytest.mark.parametrize("file", sorted(build.SOURCES.glob("*.cpp")), ids=lambda f: f.name)
def test_our_sources_compile_without_a_warning(file, level, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    compiling, _ = build._command("cpu")
    assert ("-mfma" in compiling) == (level != "DEFAULT")
    done = subprocess.run([*compiling, "-Werror", "-fsyntax-only", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", sorted((build.SOURCES / "cuda").glob("*.cu")), ids=lambda f: f.name)
def test_our_cuda_sources_compile_without_a_warning_for_the_host(file):
    compiling, _ = build._command("host")
    done = subprocess.run([*compiling, "-Werror", "-fsyntax-only", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_our_libraries_load():
    for file in sorted(build.SOURCES.glob("*.cpp")):
        assert build.library(file.stem) is build.library(file.stem) is not None
    for file in sorted((build.SOURCES / "cuda").glob("*.cu")):
        assert build.available(file.stem, "host")


def test_is_built_once(sources, cache, monkeypatch):
    first = fresh()
    assert [f.name for f in cache.iterdir()] == [Path(first._name).parent.name]
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert fresh()._name == first._name


def test_key_is_of_all_that_shapes_the_code(sources, monkeypatch):
    keys = {key()}
    (sources / "number.cpp").write_text(NUMBER + "//")
    keys.add(key())
    (sources / "number.h").write_text("")
    keys.add(key())
    monkeypatch.setattr(build, "FLAGS", build.FLAGS + " -g")
    keys.add(key())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another level")
    keys.add(key())
    monkeypatch.setenv("CXX", "g++ -g3")
    keys.add(key())
    assert len(keys) == 6 if X86 else 5
    (sources / "other.cpp").write_text(NUMBER)
    assert key() in keys, "another source is another library"


def test_a_c_compiler_will_do(sources, cache, monkeypatch):
    """The library has all that it needs, whatever else the process has loaded."""
    monkeypatch.setenv("CXX", "gcc")
    (sources / "throws.cpp").write_text('extern "C" int number() { try { throw 1; } catch (int x) { return x; } }')
    assert build.library("throws").number() == 1
    (folder,) = cache.iterdir()
    load = f"import ctypes; print(ctypes.CDLL({str(folder / 'throws.so')!r}).number())"
    done = subprocess.run([sys.executable, "-S", "-c", load], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_processes_that_build_at_once_share_one_library(sources, cache):
    command = [sys.executable, "-W", "error", "-c", LOAD, str(sources)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    (name,) = said
    assert list(cache.iterdir()) == [Path(name.strip()).parent], "a build left its folder behind"


def test_the_one_that_is_late_takes_what_is_there(sources, cache, monkeypatch):
    """Its rename finds the folder taken."""
    other = cache / key()
    run = subprocess.run

    def slow(command, **kwargs):
        done = run(command, **kwargs)
        if "ninja" in command:
            shutil.copytree(command[command.index("-C") + 1], other)
            (other / "the other's").touch()
        return done

    monkeypatch.setattr(subprocess, "run", slow)
    assert fresh()._name == str(other / "number.so")
    assert list(cache.iterdir()) == [other]
    assert (other / "the other's").exists()


def test_without_a_compiler(sources, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert "no C++ compiler is here (looked for no-such-compiler); install g++, or set $CXX to one" in warning_of()
    monkeypatch.setenv("CXX", "no-such-either -O1")
    assert "looked for $CXX=no-such-either" in warning_of()


def test_a_build_that_fails_says_what_failed(sources, cache):
    (sources / "number.cpp").write_text("void number() { return wrong_name; }")
    said = warning_of()
    assert "ninja -C" in said
    assert "wrong_name" in said
    assert "number.cpp" in said
    assert "or set $CXX to one" in said
    assert list(cache.iterdir()) == []


def test_a_cache_that_can_not_be_written(sources, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert "set $XDG_CACHE_HOME to one" in warning_of()


def test_a_damaged_library(sources, cache):
    path = cache / key() / "number.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut short")
    assert f"delete {path.parent}, to build it anew" in warning_of()


def test_folders_with_odd_names(sources, tmp_path, monkeypatch):
    odd = tmp_path / "a b$c:d"
    sources.rename(odd)
    monkeypatch.setattr(build, "SOURCES", odd)
    assert fresh() is not None


def test_one_openmp_runtime_serves_torch_and_us():
    code = (
        "import torch; from kernels import build; assert build.available('linear'); torch.ones(9).sum();"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout
    assert "torch" in done.stdout


@pytest.fixture
def cuda_sources(sources):
    (sources / "cuda").mkdir()
    (sources / "cuda" / "number.cu").write_text(
        'extern "C" int number(long* x) { *x = 7; return 9; }\n'
        'extern "C" const char* rwkv_error_string(int code) { return code == 9 ? "nine" : "?"; }\n'
    )
    return sources


def test_an_error_of_cuda_is_raised_in_its_words(cuda_sources, monkeypatch):
    monkeypatch.setattr(build, "library", functools.cache(build.library.__wrapped__))
    with pytest.raises(RuntimeError, match=r"number: nine \(CUDA error 9\)"):
        build.function.__wrapped__("number", "number", "q", "host")(0)


def test_a_failed_build_names_its_command_and_the_next_form_runs(cuda_sources, tmp_path, monkeypatch):
    """On a GPU whose compiler is broken, Triton follows."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho unsupported toolchain >&2\nexit 3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}:{os.environ['PATH']}")
    with pytest.warns(UserWarning, match="unsupported toolchain") as caught:
        assert build.library.__wrapped__("number", "cuda") is None
    said = str(caught[0].message)
    assert "ninja -C" in said
    assert "a CUDA toolkit that fits" in said
    assert "until then number runs on this GPU in Triton or torch" in said


def test_without_nvcc(cuda_sources, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "CUDA_HOMES", ())
    with pytest.raises(RuntimeError, match="no nvcc is here; install the CUDA toolkit, or set"):
        build._nvcc()


def test_import_does_no_work(tmp_path):
    modules = sorted(f.stem for f in (ROOT / "kernels").glob("*.py") if f.stem != "__init__")
    code = "; ".join(f"import kernels.{name}" for name in modules)
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": "no-such-compiler"}
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT, env=env, check=True)
    assert not (tmp_path / "cache").exists()
