# SPDX-License-Identifier: MIT
# Every target is complete on a fresh machine with Python 3.11+ and a C++ compiler: what it needs is
# installed into $(VENV) first. Stamp files in there make the next run quick.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Processes that share the tests; 0: none but pytest's own.
PYTEST_JOBS ?= auto
PYTEST := -m pytest -n $(PYTEST_JOBS) --maxprocesses 8 --dist worksteal
BENCH_ARGS ?=
# Without those that compile for each case.
QUICK := eager,hand,numpy,step,step_again,run,floor_call,floor_read,floor_gemm
# A second environment, whose torch has CUDA.
CUDA_VENV ?= .venv-cuda
CUDA_TREE := build/cuda-tree
SANITIZE_TREE := build/sanitize
EMULATED_TREE := build/emulated-gpu
# What a GPU alone has, and what every device must do.
CUDA_SUITE := tests/test_cuda.py tests/test_cuda_benchmarks.py tests/test_sgd_cuda.py
GPU_SUITE ?= $(CUDA_SUITE) $(shell cat tests/gpu_suite.txt)
# Cases of the fuzzer, the seed that they follow from (default: the clock), and processes.
FUZZ_CASES ?= 1000000
FUZZ_SEED ?= $(shell date +%s)
FUZZ_JOBS ?= 2
FUZZ_ARGS ?=

BIN := $(VENV)/bin
CSRC := $(shell find csrc -type f)
CPP_FORMATTED := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test lint format tidy tidy-light sanitize sanitize-full fuzz emulate emulate-gpu \
	emulate-planted emulate-fuzz emulated cuda-kernels package-check bench bench-quick bench-publish \
	bench-ratios bench-check build cuda-build clean
.DELETE_ON_ERROR:
# pip runs one at a time in one environment.
.NOTPARALLEL:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

demo: $(VENV)/.demo build  ## train a linear model on real data, plain and fused
	$(BIN)/python examples/diabetes.py

test: $(VENV)/.test build  ## run the test suite (PYTEST_ARGS="-k name" for a part of it)
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.lint  ## check style and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FORMATTED)
	$(BIN)/mypy

format: $(VENV)/.lint  ## bring all sources into that style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FORMATTED)

tidy: $(VENV)/.lint  ## look for mistakes in the C++ sources: clang-tidy
	@$(MAKE) --no-print-directory -f scripts/tidy.mk -j$(or $(MAX_JOBS),2) BIN=$(BIN)

tidy-light: $(VENV)/.lint  ## the same without tests and the slow bindings
	@$(MAKE) --no-print-directory -f scripts/tidy.mk -j$(or $(MAX_JOBS),2) BIN=$(BIN) light

sanitize:  ## run the torch-free C++ tests under ASan and UBSan, those with threads under TSan, too
	@$(MAKE) --no-print-directory -f tests/cpp/Makefile -j$(or $(MAX_JOBS),2) --output-sync=target

sanitize-full: $(VENV)/.test build  ## build the extension under ASan and UBSan, run the suite in it (PYTEST_ARGS)
	PYTHON=$(BIN)/python scripts/sanitize_full.sh $(SANITIZE_TREE) $(PYTEST_ARGS)

fuzz: $(VENV)/.test build  ## hold random calls of every door to the plain loop (FUZZ_CASES, FUZZ_SEED, FUZZ_ARGS)
	$(BIN)/python tests/fuzz.py --cases $(FUZZ_CASES) --seed $(FUZZ_SEED) --jobs $(FUZZ_JOBS) $(FUZZ_ARGS)

emulate:  ## run the CUDA kernels on the processor, under sanitizers, and plant mistakes
	@$(MAKE) --no-print-directory -f tests/emulation/Makefile -j$(or $(MAX_JOBS),2) --output-sync=target

# In a copy of the sources: the extension there has both engines.
emulated: $(VENV)/.test build
	scripts/copy_tree.sh $(EMULATED_TREE)
	cd $(EMULATED_TREE) && $(abspath $(BIN))/python tests/emulation/gpu/build.py --inplace

emulate-gpu: emulated  ## run the suite on GPUs that the processor emulates (GPU_SUITE, PYTEST_ARGS)
	cd $(EMULATED_TREE) && PYTHONPATH=.:tests/emulation/gpu $(abspath $(BIN))/python $(PYTEST) -p emulated_gpu \
		--device=cuda $(GPU_SUITE) $(PYTEST_ARGS)

emulate-planted: emulated  ## plant mistakes in the bindings, which that suite must find: six minutes
	cd $(EMULATED_TREE) && $(abspath $(BIN))/python tests/emulation/gpu/planted.py

emulate-fuzz: emulated  ## the fuzzer's calls on such GPUs (FUZZ_CASES, FUZZ_SEED, FUZZ_ARGS)
	cd $(EMULATED_TREE) && $(abspath $(BIN))/python tests/emulation/gpu/fuzz_emulated.py --cases $(FUZZ_CASES) \
		--seed $(FUZZ_SEED) --jobs $(FUZZ_JOBS) $(FUZZ_ARGS)

cuda-kernels:  ## compile the CUDA kernels for every architecture, if nvcc is there
	@command -v nvcc > /dev/null || { echo "cuda-kernels: NOT RUN, there is no nvcc here"; exit 0; }; \
		$(MAKE) --no-print-directory -f tests/cuda/Makefile -j$(or $(MAX_JOBS),2)

package-check: $(VENV)/.package  ## make sdist and wheels, install each in a fresh environment, run README's snippets
	scripts/check_package.sh $(BIN)/python

bench: $(VENV)/.bench build  ## measure all that this machine can run, under 15 minutes (BENCH_ARGS="cpu --rounds 5": a part)
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

bench-quick: $(VENV)/.bench build  ## a first look, under 90 s once it is built, not to be quoted
	$(BIN)/python benchmarks/bench_cpu.py --quick --no-memory --contestants $(QUICK)

bench-publish: $(VENV)/.bench  ## make tables, pictures, docs/performance.md and the README's figures from the results
	$(BIN)/python benchmarks/report.py benchmarks/results --publish

bench-ratios: $(VENV)/.bench build  ## hold speed-ups measured now against the committed ones (leave the machine alone)
	$(BIN)/python benchmarks/ratios.py

bench-check: $(VENV)/.bench build  ## hold the instruction counts of small steps against benchmarks/baseline.json
	$(BIN)/python benchmarks/instructions.py

build: $(VENV)/.built  ## compile the extension and install fused_step, editable

# In a copy of the sources: the extension there is linked to another torch.
cuda-build:  ## build with CUDA (no GPU needed), and run the suite in that build (PYTEST_ARGS)
	@$(MAKE) --no-print-directory VENV=$(CUDA_VENV) $(CUDA_VENV)/.cuda
	scripts/copy_tree.sh $(CUDA_TREE)
	cd $(CUDA_TREE) && FUSED_STEP_BUILD=require FUSED_STEP_CUDA=1 $(abspath $(CUDA_VENV))/bin/python -m pip install --quiet \
		--disable-pip-version-check --no-build-isolation --no-deps -e .
	cd $(CUDA_TREE) && $(abspath $(CUDA_VENV))/bin/python -m fused_step info
	cd $(CUDA_TREE) && $(abspath $(CUDA_VENV))/bin/python $(PYTEST) $(PYTEST_ARGS)

clean:  ## remove what was built and written, keep $(VENV)
	rm -rf build dist demo-output .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	rm -f fused_step/*.so fused_step/_build_info.json $(VENV)/.built
	find fused_step tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fused_step needs Python 3.11 or newer; name one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp for each file in requirements/; every one of them may include the others.
$(VENV)/.%: requirements/%.txt $(wildcard requirements/*.txt) $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/.built: $(VENV)/.build setup.py pyproject.toml $(CSRC) $(wildcard fused_step/_build/*.py)
	@command -v c++ > /dev/null || { echo "fused_step needs a C++20 compiler (c++)" >&2; exit 1; }
	FUSED_STEP_BUILD=require $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps -e .
	@touch $@
