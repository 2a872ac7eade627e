# make demo | test | bench | lint | sanitize | cuda-check | clean. Needs Python >= 3.11; a C++ compiler makes it fast.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.ppnet
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc tests/cuda -type f -not -name '*.py*' 2>/dev/null)
CUDA_ARCHS ?= 80 89 90a 100 120
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
WORKERS ?= $(shell echo $$(($(JOBS) < 8 ? $(JOBS) : 8)))
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard $(CUDA_HOME)/bin/nvcc) $(wildcard /usr/local/cuda/bin/nvcc))

.PHONY: demo test bench lint sanitize cuda-check clean
.DELETE_ON_ERROR:

# What tests were installed with has all that the demo needs.
demo: $(STAMPS)/$(if $(wildcard $(STAMPS)/test),test,report)
	$(BIN)/ppnet demo --out ppnet-demo --force $(ARGS)

# One process per core, with one thread each: tests set the threads that they need.
test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

bench: $(STAMPS)/test
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-sort=name $(ARGS)

lint: $(STAMPS)/test
	$(BIN)/ruff check .
	$(BIN)/mypy

# The tests of the operators and of the emulator of CUDA under AddressSanitizer and UndefinedBehaviorSanitizer, in a build
# of its own; any report fails.
# Tests of tracing are left out: they run torch's code more than ours; so is the one of resident memory, which is the
# sanitizer's here. Leaks are not looked for: Python leaves memory behind at exit. libstdc++ is preloaded because the
# interpreter does not bring it.
SANITIZE_ARGS ?= -k "not compile and not export and not opcheck and not checkpointing and not resident"
SANITIZED := $(CURDIR)/build/sanitize/lib
SANITIZE_ENV = LD_PRELOAD="$$($(or $(CXX),g++) -print-file-name=libasan.so) $$($(or $(CXX),g++) -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) $(CURDIR)/$(BIN)/python -P
sanitize: $(STAMPS)/test
	@echo "== ppnet: building with AddressSanitizer and UndefinedBehaviorSanitizer"
	PPNET_SANITIZE=ON PPNET_EMULATOR=ON PPNET_CUDA=OFF PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build --build-base build/sanitize \
	  --build-lib $(SANITIZED)
	@$(SANITIZE_ENV) -c "import ppnet._C as m; assert m.__file__.startswith('$(SANITIZED)'), m.__file__; \
	  import ppnet.extension as e; print('== ppnet: tests with', m.__file__, 'on', ', '.join(e.supported_isas()))"
	OMP_NUM_THREADS=1 $(SANITIZE_ENV) -m pytest -n $(WORKERS) -p no:cacheprovider --capture=sys $(SANITIZE_ARGS) tests/ops tests/cuda

# Compiles every CUDA source for every architecture, warnings and register spills being errors, and prints registers,
# shared memory and what instructions they became.
cuda-check:
	@test -n "$(NVCC)" || { echo "cuda-check: no nvcc on PATH, in CUDA_HOME or /usr/local/cuda; nothing was checked"; exit 1; }
	@$(PYTHON) tests/cuda/compile_kernels.py --nvcc "$(NVCC)" --archs "$(CUDA_ARCHS)" --include csrc --out build/cuda-check \
	  --jobs $(JOBS) $(wildcard csrc/cuda/*.cu tests/cuda/*.cu)

clean:
	rm -rf build dist *.egg-info $(VENV) ppnet/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks

$(STAMPS)/venv:
	@echo "== ppnet: creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@echo "== ppnet: installing $(TORCH), unless torch is already there"
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install --progress-bar off "$(TORCH)"
	@touch $@

# Without a C++ compiler setup.py installs pure Python, and says so: the build tools are not needed then.
$(STAMPS)/tools: $(STAMPS)/torch
	@echo "== ppnet: installing the build tools"
	if command -v c++ g++ clang++ $(CXX) >/dev/null 2>&1; then \
	  $(PIP) install -q "setuptools>=77" pybind11 cmake ninja; else $(PIP) install -q "setuptools>=77"; fi
	@touch $@

# The demo runs on the CPU. Tests load the CUDA kernels where there is nvcc, and need them for no more than one architecture.
BUILD_report = PPNET_EMULATOR=OFF PPNET_CUDA=$(or $(PPNET_CUDA),OFF)
BUILD_test = PPNET_EMULATOR=ON PPNET_CUDA_ARCHS="$(or $(PPNET_CUDA_ARCHS),80-real;80-virtual)"
$(STAMPS)/report $(STAMPS)/test: $(STAMPS)/%: $(STAMPS)/tools $(SOURCES)
	@echo "== ppnet: building the extension and installing ppnet[$*]"
	$(BUILD_$*) PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(PIP) install -q --no-build-isolation -e ".[$*]"
	$(BIN)/python -W ignore -c "from ppnet.extension import build_info; print('ppnet:', build_info())"
	@touch $@
