# SPDX-License-Identifier: Apache-2.0
# Tests, benchmarks and type checks run on the package installed into .venv, never on the checkout: the checkout's root
# holds folders named kernels/ and bench/ that must not become importable.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
SOURCES := setup.py CMakeLists.txt README.md LICENSE $(shell find csrc rlkern kernels bench -type f ! -name '*.pyc' ! -name '*.so')
CXX_SOURCES := $(shell find csrc tests/cuda_emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTEST_ARGS ?=
ASAN := build/asan
FRAMEWORKS := .frameworks
GPU := build/gpu
EMULATED := build/emulated
CUDA := build/cuda
CUDA_ARCHS ?= 80-real;90-real;100-real;120
CUDA_TESTS := $(patsubst %,tests/test_%.py,affine_scan correction correction_shapes cuda_emulator discounted_returns group group_nan \
	importance_weights kl kl_weighted loss loss_shapes math_parity numerics_policy outcome_advantages packed_advantages policy_select \
	policy_variants scan scan_long shape_rewards token_baseline value_loss whiten whiten_shapes)
CMAKE = $(BIN)/cmake -G Ninja -S . -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DPython_EXECUTABLE=$(BIN)/python
GPU_RESULTS ?= build/gpu
GPU_COMMIT ?= $(shell git rev-parse HEAD 2>/dev/null)
export PATH := $(BIN):$(PATH)
unexport PYTHONPATH

.PHONY: help run test emulated test-frameworks bench-frameworks bench lint asan pure sass cuda-build gpu
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.installed ## set up, check every op on a real rollout batch, then time it
	$(BIN)/rlkern verify
	$(BIN)/rlkern bench --quick

test: $(VENV)/.installed $(if $(shell command -v g++),emulated) ## set up and run the tests, Triton kernels interpreted, CUDA kernels emulated (PYTEST_ARGS="-k gae" for some)
	$(BIN)/pytest -n auto $(PYTEST_ARGS)
	$(BIN)/pytest -n auto --backend triton $(PYTEST_ARGS) || [ $$? = 5 ]  # 5: PYTEST_ARGS chose none
	command -v g++ > /dev/null || exit 0; $(BIN)/pytest -n auto --backend cuda $(CUDA_TESTS) $(PYTEST_ARGS) || [ $$? = 5 ]

emulated: $(VENV)/.tools ## csrc/cuda as C++ on tests/cuda_emulator, under sanitizers: what pytest --backend cuda runs without a GPU
	$(CMAKE) -B $(EMULATED) -DRLKERN_EMULATED=ON -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(EMULATED)
	$(BIN)/cmake --build $(EMULATED) --parallel 2 --target _C_cuda

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

sass: $(VENV)/.installed ## compile the Triton kernels (sm_80 to sm_120, gfx942) and, with nvcc, the CUDA ones; hold the machine code to their plans
	$(BIN)/python tools/sass_check.py
	if command -v nvcc > /dev/null; then $(MAKE) cuda-build && $(BIN)/python tools/cuda_check.py $(CUDA)/_C_cuda*.so; \
	else echo "make sass: the CUDA kernels are left out, as nvcc is not on PATH"; fi

cuda-build: $(VENV)/.tools ## compile and link the CUDA module by nvcc, without a GPU (CUDA_ARCHS="90-real" for one)
	@command -v nvcc > /dev/null || { echo "make cuda-build: nvcc must be on PATH; install a CUDA toolkit."; exit 1; }
	$(CMAKE) -B $(CUDA) -DRLKERN_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHS)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/$(CUDA)
	$(BIN)/cmake --build $(CUDA) --parallel 2 --target _C_cuda

# With that machine's own Python, torch and Triton: nothing is fetched. GPU_RESULTS is where the results go; GPU_STEPS: some of
# tests sanitizers bench, each under nine minutes. Without nvcc the CUDA half is left out, and the report says so.
gpu: ## on a machine with a GPU: install beside its own torch, run every test there by Triton and CUDA, sanitizers, the table
	rm -rf $(GPU)/site
	RLKERN_NATIVE=1 RLKERN_CUDA=$(if $(shell command -v nvcc),1,0) CUDAARCHS=native $(PYTHON) -m pip install -q --no-build-isolation --no-deps --target $(GPU)/site .
	PYTHONPATH=$(CURDIR)/$(GPU)/site $(PYTHON) tools/gpu.py $(GPU_RESULTS) $(GPU_COMMIT) $(if $(GPU_STEPS),--steps $(GPU_STEPS))

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
