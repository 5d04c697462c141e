# SPDX-License-Identifier: Apache-2.0
# Tests, benchmarks and type checks run on the package installed into .venv, never on the checkout: the checkout's root
# holds folders named kernels/ and bench/ that must not become importable.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
SOURCES := setup.py CMakeLists.txt README.md LICENSE $(shell find csrc rlkern kernels bench -type f ! -name '*.pyc' ! -name '*.so')
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTEST_ARGS ?=
ASAN := build/asan
FRAMEWORKS := .frameworks
GPU := build/gpu
GPU_RESULTS ?= build/gpu
GPU_COMMIT ?= $(shell git rev-parse HEAD 2>/dev/null)
export PATH := $(BIN):$(PATH)
unexport PYTHONPATH

.PHONY: help run test test-frameworks bench-frameworks bench lint asan pure sass cuda-build gpu
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.installed ## set up, check every op on a real rollout batch, then time it
	$(BIN)/rlkern verify
	$(BIN)/rlkern bench --quick

test: $(VENV)/.installed ## set up and run the tests, those of the Triton kernels interpreted (PYTEST_ARGS="-k gae" for some)
	$(BIN)/pytest -n auto $(PYTEST_ARGS)
	$(BIN)/pytest -n auto --backend triton $(PYTEST_ARGS) || [ $$? = 5 ]  # 5: PYTEST_ARGS chose none

test-frameworks: $(FRAMEWORKS)/.installed ## verl, OpenRLHF and TRL in an environment of their own, with rlkern inside them (2 GB)
	cd $(FRAMEWORKS) && venv/bin/pytest -c ../pyproject.toml --rootdir .. --confcutdir ../tests/frameworks -p no:cacheprovider \
	../tests/frameworks $(PYTEST_ARGS)

bench-frameworks: $(FRAMEWORKS)/.installed ## verl patched against unpatched, one thread; the table in build/frameworks.json
	mkdir -p build
	cd $(FRAMEWORKS) && OMP_NUM_THREADS=1 venv/bin/python ../tests/frameworks/speed.py ../build/frameworks.json

bench: $(VENV)/.installed ## absolute times per op, kept in .benchmarks (for claims use: rlkern bench)
	$(BIN)/pytest --pyargs rlkern.bench -o python_files='bench_*.py' --benchmark-autosave $(PYTEST_ARGS)

lint: $(VENV)/.installed ## ruff, clang-format, the house's bans, mypy --strict on the installed package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/python tools/bans.py
	cd $(VENV) && $(BIN)/mypy --strict --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p rlkern

asan: $(VENV)/.installed ## the tests under AddressSanitizer and UBSan, less packaging, lint and torch.compile ones
	rm -rf $(ASAN) build/lib*
	RLKERN_SANITIZE=1 RLKERN_NATIVE=1 $(BIN)/pip install -q --no-build-isolation --no-deps --target $(ASAN) .
	rm -rf build/lib*
	PYTHONPATH=$(CURDIR)/$(ASAN) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	$(BIN)/pytest -k "not registers" --ignore tests/test_packaging.py --ignore tests/test_bans.py $(PYTEST_ARGS)

pure: $(VENV)/.installed ## the tests on the pure-Python package (RLKERN_NATIVE=0), which has the torch backend alone
	rm -rf build/pure build/lib*
	RLKERN_NATIVE=0 $(BIN)/pip install -q --no-build-isolation --no-deps --target build/pure .
	rm -rf build/lib*
	PYTHONPATH=$(CURDIR)/build/pure $(BIN)/pytest --ignore tests/test_packaging.py --ignore tests/test_bans.py $(PYTEST_ARGS)

sass: $(VENV)/.installed ## compile the Triton kernels for sm_80 to sm_120 and gfx942, and hold the machine code to their plans
	$(BIN)/python tools/sass_check.py

cuda-build: ## compile the CUDA module without a GPU (not in this release)
	@echo "make cuda-build: this release has no csrc/cuda and no CUDA target in CMakeLists.txt."; exit 1

# With that machine's own Python, torch and Triton: nothing is fetched. GPU_RESULTS is where the results go.
gpu: ## on a machine with a GPU: install beside its own torch, run every test there, then the table (under nine minutes)
	rm -rf $(GPU)/site
	RLKERN_NATIVE=1 $(PYTHON) -m pip install -q --no-build-isolation --no-deps --target $(GPU)/site .
	PYTHONPATH=$(CURDIR)/$(GPU)/site $(PYTHON) tools/gpu.py $(GPU_RESULTS) $(GPU_COMMIT)

# Dependencies and tools. The package comes along as pure Python here: the rule below builds it with the venv's own
# CMake and Ninja, whose objects in build/ survive, so that a changed file costs one compilation.
$(VENV)/.tools: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	RLKERN_NATIVE=0 $(BIN)/pip install -q -c constraints.txt '.[dev]'
	touch $@

# setuptools never deletes from build/lib: a file removed from the source would stay in the package.
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	rm -rf build/lib*
	$(BIN)/pip install -q --no-build-isolation --no-deps --force-reinstall .
	touch $@

# verl, OpenRLHF and DeepSpeed without their dependencies, which ask for CUDA builds of torch; two older verl beside.
$(FRAMEWORKS)/.tools: tests/frameworks/requirements.txt constraints.txt
	$(PYTHON) -m venv $(FRAMEWORKS)/venv
	$(FRAMEWORKS)/venv/bin/pip install -q -c constraints.txt -r tests/frameworks/requirements.txt
	DS_BUILD_OPS=0 $(FRAMEWORKS)/venv/bin/pip install -q --no-deps --no-build-isolation verl==0.9.1 openrlhf==0.11.2 deepspeed==0.19.6
	for v in 0.8.0 0.7.1; do $(FRAMEWORKS)/venv/bin/pip install -q --no-deps --upgrade --target $(FRAMEWORKS)/verl-$$v verl==$$v; done
	touch $@

$(FRAMEWORKS)/.installed: $(FRAMEWORKS)/.tools $(SOURCES)
	rm -rf build/lib*
	RLKERN_NATIVE=1 $(FRAMEWORKS)/venv/bin/pip install -q --no-build-isolation --no-deps --force-reinstall .
	touch $@
