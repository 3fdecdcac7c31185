import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from kernels import build

ROOT = Path(__file__).parents[2]

NUMBER = 'extern "C" void number(long* x) { *x = 7; }\n'

LOAD = """
import sys
from pathlib import Path
from kernels import build
build.SOURCES = Path(sys.argv[1])
build.function("number", "q")  # builds and loads
print(build.library()._name)
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
    return build.library.__wrapped__()


def warning_of():
    """What the one warning says, where there is no library."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fresh() is None
    (warning,) = caught
    assert "until then RWKV runs on this CPU in torch" in str(warning.message)
    return str(warning.message)


def test_our_sources_compile_without_a_warning():
    for file in sorted(build.SOURCES.glob("*.cpp")):
        command = [*build._compiler(), *build.FLAGS.split(), "-Werror", "-fsyntax-only", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert build.library() is build.library() is not None


def test_is_built_once(sources, cache, monkeypatch):
    first = fresh()
    assert [f.name for f in cache.iterdir()] == [Path(first._name).parent.name]
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert fresh()._name == first._name


def test_key_is_of_all_that_shapes_the_code(sources, monkeypatch):
    keys = {build._key(["c++"])}
    (sources / "number.cpp").write_text(NUMBER + "//")
    keys.add(build._key(["c++"]))
    (sources / "number.h").write_text("")
    keys.add(build._key(["c++"]))
    keys.add(build._key(["c++", "-g"]))
    monkeypatch.setattr(build, "FLAGS", build.FLAGS + " -g")
    keys.add(build._key(["c++"]))
    monkeypatch.setattr(build, "_processor", lambda: "another processor")
    keys.add(build._key(["c++"]))
    assert len(keys) == 6


def test_processes_that_build_at_once_share_one_library(sources, cache):
    command = [sys.executable, "-W", "error", "-c", LOAD, str(sources)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    (name,) = said
    assert list(cache.iterdir()) == [Path(name.strip()).parent], "a build left its folder behind"


def test_the_one_that_is_late_takes_what_is_there(sources, cache, monkeypatch):
    """Its rename finds the folder taken."""
    other = cache / build._key(build._compiler())
    run = subprocess.run

    def slow(command, **kwargs):
        done = run(command, **kwargs)
        if "ninja" in command:
            shutil.copytree(command[command.index("-C") + 1], other)
            (other / "the other's").touch()
        return done

    monkeypatch.setattr(subprocess, "run", slow)
    assert fresh()._name == str(other / "rwkv.so")
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
    path = cache / build._key(build._compiler()) / "rwkv.so"
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
        "import torch; from kernels import build; assert build.available(); torch.ones(9).sum();"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout
    assert "torch" in done.stdout


def test_import_does_no_work(tmp_path):
    modules = sorted(f.stem for f in (ROOT / "kernels").glob("*.py") if f.stem != "__init__")
    code = "; ".join(f"import kernels.{name}" for name in modules)
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": "no-such-compiler"}
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT, env=env, check=True)
    assert not (tmp_path / "cache").exists()
