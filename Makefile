# Two commands: `make demo` and `make test`. Each sets up all that it needs; nothing is assumed but Python 3.11+ and g++.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1

.PHONY: setup demo test test-all lint clients gpu-check
setup: .venv/.done

# uv installs in a third of pip's time; where it can't be had, pip does it.
.venv/.done: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python %d.%d: RWKV-Flow needs 3.11 or later; make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e ".[dev]" \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	dvc repro
	@python -m demo.summary

test: setup
	python -m pytest -n logical --dist loadfile -m "not slow and not gpu"

test-all: setup
	python -m pytest -n logical --dist loadfile -m "not gpu"

lint: setup
	ruff check .
	ruff format --check .
	mypy

# llama.cpp takes minutes to build, so no other target has it: with it, the tests of what it reads and computes are run too.
clients: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python
	python -m pytest -n logical --dist loadfile -m "not gpu" tests/rwkv_core/conformance tests/rwkv_core/formats/test_gguf.py

# On a machine with a CUDA device and a torch of its own: what only it can check, then what only it can measure, into
# benchmarks/results. It needs torch, triton, nvcc and pytest, and no .venv.
gpu-check:
	$(PYTHON) -m pytest -m gpu tests/kernels tests/rwkv_core/models/test_versions.py
	$(PYTHON) -m benchmarks.gpu
