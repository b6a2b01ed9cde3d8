# SPDX-License-Identifier: MIT
# clang-tidy over the C++ that the host compiler sees, from the root of the repository:
#   make -f scripts/tidy.mk -j2 BIN=.venv/bin          all of it
#   make -f scripts/tidy.mk -j2 BIN=.venv/bin light    without tests, slow bindings only compiled
# A file that was clean is looked at again only when it, a header or the checks have changed. The
# kernels of CUDA and their bindings are left out: torch for the CPU lacks headers that they need.

BIN ?= .venv/bin
BUILD ?= build/tidy

CUDA := %_cuda.cpp %/cuda_support.cpp
# More than 20 s of processor time each: 170 s of the 470 s that all files take.
SLOW := $(addprefix csrc/bindings/,linear_mse_autograd.cpp linear_mse_cpu.cpp linear_mse_sgd_cpu.cpp \
	linear_step.cpp sgd_step.cpp)
SOURCES := $(filter-out $(CUDA),$(wildcard csrc/bindings/*.cpp csrc/cpu/*.cpp tests/cpp/*.cpp))
HEADERS := $(wildcard csrc/*/*.h tests/cpp/*.h)
# Where the headers of Python and torch are; torch itself is not imported. No -fopenmp: clang would
# look for an omp.h of its own.
FIND := import sysconfig, importlib.util as u; \
	t = u.find_spec("torch").submodule_search_locations[0] + "/include"; \
	print("-isystem" + sysconfig.get_path("include"), "-isystem" + t, \
	"-isystem" + t + "/torch/csrc/api/include")
SYSTEM := $(shell $(BIN)/python -c '$(FIND)')
FLAGS := -std=c++20 -Icsrc -Itests/cpp $(SYSTEM) -DTORCH_EXTENSION_NAME=_C

.PHONY: tidy light
tidy: $(SOURCES:%=$(BUILD)/%.clean)
light: $(patsubst %,$(BUILD)/%.clean,$(filter-out $(SLOW) tests/%,$(SOURCES))) \
	$(SLOW:%=$(BUILD)/%.whole)

$(BUILD)/%.clean: % $(HEADERS) .clang-tidy scripts/tidy.mk requirements/lint.txt
	@mkdir -p $(@D)
	$(BIN)/clang-tidy --quiet $< -- $(FLAGS)
	@touch $@

# That each includes what it needs: it is compiled with others, in csrc/units/.
$(BUILD)/%.whole: % $(HEADERS) scripts/tidy.mk
	@mkdir -p $(@D)
	$(CXX) -fsyntax-only -fvisibility=hidden -Wno-psabi $(FLAGS) $<
	@touch $@
