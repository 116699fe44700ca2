# `make test` and `make bench` set everything up on a fresh clone; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
PATCHGEN_FAST_BUILD ?= auto
export PATCHGEN_FAST_BUILD

BIN := $(VENV)/bin
SOURCES := $(shell git ls-files --cached --others --exclude-standard csrc setup.py 2>/dev/null || find csrc setup.py -type f)
CXX_SOURCES := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))
# One stamp for each way to build, so that switching builds again.
empty :=
BUILT := $(VENV)/.built-$(PATCHGEN_FAST_BUILD)$(subst ;,_,$(subst $(empty) ,_,$(PATCHGEN_FAST_CUDA_ARCHS)))

.PHONY: help test test-triton bench demo sweep readme build environment lint format wheel install-check load-check sanitize cuda-part gpu-code-report gpu clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12   the interpreter (3.10 to 3.13); its torch is kept if it is 2.10 or later"
	@echo "  ARGS=\"...\"          passed to pytest by test, to patchgen-fast bench by bench, ..."
	@echo "  PATCHGEN_FAST_BUILD=auto|none|cpu|cuda, PATCHGEN_FAST_CUDA_ARCHS=\"80;90a\"   see setup.py"

# Setting up -------------------------------------------------------------------------------------

environment: $(VENV)/.requirements ## .venv with the pinned requirements

$(VENV)/.requirements: requirements/dev.txt requirements/prepare.py
	TARGET=$(or $(firstword $(MAKECMDGOALS)),test) $(PYTHON) requirements/prepare.py $(VENV) $<
	@touch $@

# The package itself, as a link to this folder; its native part comes next, in place.
$(VENV)/.package: $(VENV)/.requirements pyproject.toml
	PATCHGEN_FAST_BUILD=none $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/.built-*
	@touch $@

build: $(BUILT) ## the native part, in place

$(BUILT): $(VENV)/.package $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@rm -f $(VENV)/.built-*
	@touch $@

# Running ----------------------------------------------------------------------------------------

# Kernels in Triton's interpreter and kernels compiled ahead of time need processes of their own: the
# interpreter is switched on when a kernel is decorated.
PYTEST := $(BIN)/python -m pytest $(ARGS)
APART := tests/triton_interpreter tests/triton_aot tests/cuda_host
# With ARGS, or on a system that Triton is not made for, a part may be left with no test (status 5).
MAY_BE_EMPTY := $(ARGS)$(filter-out Linux,$(shell uname -s))
run_part = $(if $(wildcard $(1)),$(2) $(PYTEST) $(1) $(3)$(if $(MAY_BE_EMPTY), || [ $$? -eq 5 ]),@true)

# LLVM allocates and frees small pieces without end: let malloc keep them at hand.
MALLOC := GLIBC_TUNABLES=$(subst $(empty) ,:,$(addprefix glibc.malloc., \
    tcache_count=65535 tcache_max=65536 trim_threshold=4294967296 top_pad=67108864 \
    mmap_threshold=1073741824))

define TRITON_TESTS
$(call run_part,tests/triton_interpreter,TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1,-n $(JOBS))
$(call run_part,tests/triton_aot,$(MALLOC),-n $(JOBS) --dist worksteal)
endef

test: build ## all tests
	OMP_NUM_THREADS=1 $(PYTEST) tests $(APART:%=--ignore=%) -n $(JOBS) --dist loadfile$(if $(ARGS), || [ $$? -eq 5 ])
	$(call run_part,tests/cuda_host,,-n $(JOBS))
	$(TRITON_TESTS)

test-triton: build ## the Triton kernels, interpreted and compiled ahead of time
	$(TRITON_TESTS)

bench: build ## the fast layers against eager PyTorch, parity and speed
	$(BIN)/patchgen-fast bench $(ARGS)

demo: build ## train a generator on scanned digits, draw and evaluate: some minutes, pictures in results/demo
	$(BIN)/python benchmarks/generator_demo.py $(ARGS)

SWEEP ?= timm
sweep: build ## swap over every attention model of SWEEP=timm, held against float64; goes on where it stopped
	$(BIN)/python benchmarks/sweep.py $(SWEEP) $(ARGS)

readme: environment ## the README's benchmark tables, from benchmarks/results
	$(BIN)/python -m patchgen_fast.bench.readme

# Keeping house ----------------------------------------------------------------------------------

# As modules, not scripts: a kept environment's packages come without their scripts.
CLANG_FORMAT := $(BIN)/python -c 'from clang_format import clang_format; clang_format()'

lint: environment ## ruff, clang-format, mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/python -m mypy

format: environment ## rewrite all sources as lint wants them
	$(BIN)/python -m ruff check --fix-only --quiet .
	$(BIN)/python -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_SOURCES)

wheel: environment ## dist/*.whl
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps \
	    --wheel-dir dist .
	@ls -l dist/*.whl

install-check: environment ## the wheel in dist, installed elsewhere and used
	.ci/install-check $(VENV)

cuda-part: environment ## the native part with code for every GPU, in build/cuda; needs nvcc, takes long
	PATCHGEN_FAST_BUILD=cuda $(BIN)/python setup.py --quiet build --build-base build/cuda

TORCH ?= 2.14.1
load-check: cuda-part ## that part beside a CUDA build of TORCH=2.14.1 (5 GB, installed apart): loads, CPU ops pass
	JOBS=$(JOBS) .ci/load-check $(PYTHON) $(TORCH) build/cuda/lib.*

# The native part with the address and undefined-behaviour sanitizers, in a folder of its own, and the
# tests of the CPU kernels with it.
SANITIZERS := address,undefined
SANITIZE_TESTS ?= $(wildcard tests/test_attention*.py tests/test_patch*.py tests/test_linear*.py tests/test_*layer_norm.py tests/test_qk_norm_rope*.py tests/test_varlen*.py tests/test_kept_memory.py)

sanitize: environment ## the CPU kernels' tests under the sanitizers (g++; some minutes)
	CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=$(SANITIZERS) -fno-sanitize-recover=undefined" \
	    LDFLAGS=-fsanitize=$(SANITIZERS) PATCHGEN_FAST_BUILD=cpu \
	    $(BIN)/python setup.py --quiet build --build-base build/sanitize
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    PYTHONPATH=$$(echo $$PWD/lib*) $(abspath $(BIN))/python -m pytest -k "$(or $(K),cpu or kept_memory)" -n $(JOBS) \
	    -p no:cacheprovider $(abspath $(SANITIZE_TESTS))

gpu-code-report: cuda-part ## what the GPU compilers make of the kernels; needs nvcc, no GPU
	$(BIN)/python benchmarks/cuda_code_report.py build/cuda/lib.*/patchgen_fast/_kernels.so
	$(BIN)/python benchmarks/gpu_code_report.py

gpu: environment ## build, check, measure and profile on the GPU at hand, in ten minutes
	$(BIN)/python benchmarks/gpu/run.py --out results/gpu $(ARGS)

clean: ## what was built; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache $(VENV)/.built-*
	rm -f patchgen_fast/*.so patchgen_fast/build_record.json
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
