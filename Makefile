# Every development command. Two do all set-up on a fresh machine (python >= 3.10, make, g++): `make bench`, `make test`.
# `make bench PYTHON=python3 VENV=` (and test, lint, ...) uses the interpreter and packages that are already there.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
WORKERS ?= 2
ABI_TORCH ?= 2.15.0 2.14.1 2.11.0
ABI_TESTS ?= tests/ops/test_parity.py tests/ops/test_ops.py tests/api/test_compile.py
TRITON ?= 3.6.0 3.7.1 3.8.0 3.9.0
TRITON_TESTS ?= test_configuration or test_triton_group or (test_parity and both-ways and unsorted)

BUILD := setup.py $(wildcard kernel_build/*.py)
CSRC := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
LIBRARY := rnnfast/_C.so
EMULATOR := rnnfast/_C_emulator.so
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifeq ($(VENV),)
PY := $(PYTHON)
PACKAGES :=
else
PY := $(VENV)/bin/python
PACKAGES := $(VENV)/packages-installed
endif
# Without an environment of its own rnnfast is not installed, and programs that a test starts elsewhere must find it too.
RUN = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PY)
RUFF = $(PY) -m ruff
CLANG_FORMAT = $(PY) -c "from clang_format import clang_format; clang_format()"

.PHONY: help setup test test-full test-rest kernel-test kernel-bench emulator cuda cuda-estimate bench gpu-check lint format docs-images test-asan test-triton-matrix abi-check aarch64-check clean

help:
	@echo "make test | test-full | bench [BENCH=cpu|full|gpu-quick|gpu] | gpu-check | emulator | cuda | lint | format"
	@echo "make kernel-test | kernel-bench [ISA=base|avx2|avx512|avx512_bf16|neon]"
	@echo "make docs-images | test-asan | cuda-estimate | test-triton-matrix | abi-check | aarch64-check | clean"

setup: $(PACKAGES) $(LIBRARY)

# `make test` runs some parameter sets of every test and leaves out what is slow, `make test-rest` runs the others, and
# `make test-full` everything (tests/support/selection.py). `make test TESTS=...` runs all that it names.
# All tests run in WORKERS processes, a file in one of them, in the order of tests/conftest.py. Some of the tests, or all
# with WORKERS=1, run in one and need no pytest-xdist. The benchmark's own run before all tests, in processes of their
# own: torch's test suite, part of ours, forbids the process to change torch's switches, which they must. `pytest tests`
# leaves them out (collect_ignore in tests/conftest.py).
SPREAD = $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)
ALL = $(filter tests,$(TESTS))
test: SELECT := quick
test-full: SELECT := full
test-rest: SELECT := rest
test test-full test-rest: setup $(EMULATOR)
	$(if $(ALL),$(RUN) -m pytest $(SPREAD) --select $(SELECT) tests/bench bench)
	$(RUN) -m pytest $(if $(ALL),$(SPREAD) --select $(SELECT)) $(TESTS)

# Unit tests and micro-benchmarks of the CPU kernels' parts, in C++: for all instruction sets of this machine, or for ISA.
# They need GoogleTest and Google Benchmark (Debian: libgtest-dev, libbenchmark-dev), and neither torch nor packages.
kernel-test:
	$(PYTHON) tools/kernel_check.py test $(if $(ISA),--isa $(ISA))

kernel-bench:
	$(PYTHON) tools/kernel_check.py bench $(if $(ISA),--isa $(ISA))

# The CUDA kernels, for a torch with CUDA and an nvcc of the same major version. Needs no GPU; TORCH_CUDA_ARCH_LIST=9.0
# builds for one architecture, all take minutes.
cuda: setup
	RNNFAST_BUILD=1 RNNFAST_CUDA=1 $(PY) setup.py -q build_ext --inplace

# Cycles per step of the CUDA kernels' time loops, estimated from their machine code. Needs nvcc, no GPU.
cuda-estimate: $(PACKAGES)
	export PYTHONPATH=tests:tools; $(RUN) -m cuda_estimate.sass_cycles

# The CUDA kernels and their host code for CPU tensors, where rnnfast.backend("emulator") and the tests find them.
emulator: setup $(EMULATOR)

bench: setup
	$(RUN) -m bench

# On a machine with a GPU: builds, checks the kernels on it, leaves logs and summary.json in OUT; at most 8 minutes.
OUT ?= bench/out/gpu
gpu-check: $(PACKAGES)
	$(RUN) tools/gpu_check.py --out $(OUT)

lint: $(PACKAGES)
	$(RUFF) check .
	$(RUFF) format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CSRC)

format: $(PACKAGES)
	$(RUFF) check --fix .
	$(RUFF) format .
	$(CLANG_FORMAT) -i $(CSRC)

# The pictures of the README and of docs/, drawn from bench/results. Needs Python alone.
docs-images:
	$(PYTHON) tools/docs_images.py

# The packages first and without building rnnfast (RNNFAST_BUILD=0), so that a change of a kernel never runs pip.
# --no-compile: byte code of the few modules in use is made when they are, which halves the set-up (48 s of CPU to 20 s).
PIP = $(PY) -m pip install -q --no-compile
$(VENV)/packages-installed: pyproject.toml Makefile
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77.0.3" "$(TORCH)"
	RNNFAST_BUILD=0 $(PIP) --no-build-isolation -e ".[dev]" "$(TORCH)"
	touch $@

$(LIBRARY): $(BUILD) $(filter csrc/common/% csrc/cpu/%,$(CSRC)) | $(PACKAGES)
	RNNFAST_BUILD=1 RNNFAST_CUDA=0 $(PY) setup.py -q build_ext --inplace

$(EMULATOR): $(BUILD) $(filter csrc/common/% csrc/cuda/% csrc/emulator/%,$(CSRC)) | $(PACKAGES)
	RNNFAST_BUILD=1 RNNFAST_EMULATOR=1 $(PY) setup.py -q build_ext --inplace

# The parity tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer. The leak check stays off:
# it would report Python's and torch's own blocks that live until the process ends.
ASAN := build/asan
test-asan: $(PACKAGES)
	RNNFAST_BUILD=1 RNNFAST_SANITIZE=address,undefined $(PY) setup.py -q build_ext --build-lib $(ASAN) --build-temp $(ASAN)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 RNNFAST_C_LIBRARY=$(CURDIR)/$(ASAN)/$(LIBRARY) \
	$(RUN) -m pytest tests/ops/test_parity.py

# One library, built with the newest torch, must load and work under every torch that we support.
abi-check:
	PYTHON="$(PYTHON)" TESTS="$(ABI_TESTS)" bash tools/abi_check.sh $(ABI_TORCH)

# The Triton kernels under every Triton that we support: one row of each kernel compiled, each kernel interpreted; 110 s
# of CPU each, and what pip takes.
test-triton-matrix:
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" TESTS="$(TRITON_TESTS)" bash tools/triton_matrix.sh $(TRITON)

# The ARM files compile and link (against empty stand-ins for torch's libraries); running them needs such a machine.
ARM := aarch64-linux-gnu-g++
aarch64-check: $(PACKAGES)
	@command -v $(ARM) >/dev/null || { echo "$(ARM) is missing (Debian: apt-get install g++-aarch64-linux-gnu)"; exit 1; }
	mkdir -p build/aarch64
	$(ARM) -shared -o build/aarch64/libtorch_cpu.so -x c++ /dev/null
	RNNFAST_BUILD=1 CXX=$(ARM) LDFLAGS="-Lbuild/aarch64" $(PY) setup.py -q build_ext --build-lib build/aarch64 --build-temp build/aarch64
	readelf -h build/aarch64/$(LIBRARY) | grep Machine

clean:
	rm -rf build dist *.egg-info bench/out rnnfast/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
