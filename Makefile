# `make demo` and `make test` do everything from a fresh clone: virtual environment, torch, build, run.
# Needed beforehand: Python >= 3.10 with venv, a C++20 compiler, cmake; nvcc for the CUDA kernels.
#
#   make test PYTHON=python3.12 TORCH=torch==2.11.0 JOBS=4 PYTEST_ARGS="-k mae"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTEST_ARGS ?=
# Processes that run tests, each with torch's threads. Two, however many cores there are: a C++ compiler or a group of
# processes started by a test comes on top, and on one GPU more would only wait. 0: none but pytest's own, as for --pdb.
JOBS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=
WHEELS_ARGS ?=
BENCH_OUT ?= benchmarks/results/cpu

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
SOURCES := CMakeLists.txt setup.py pyproject.toml MANIFEST.in $(shell find csrc)
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Empty files that say which step is done; the first carries the torch that was asked for.
TORCH_DONE := $(VENV)/.done-$(subst /,_,$(subst =,-,$(TORCH)))
BUILD_DONE := $(VENV)/.done-build-$(or $(FUSED_LOSSES_CUDA),auto)
DEV_DONE := $(VENV)/.done-dev

.PHONY: build check test test-long test-emulated test-compiled demo bench bench-compile docs lint format wheel wheels clean distclean

build: $(BUILD_DONE)

# `python -m benchmarks`, even where Python is told not to look into the current folder by itself
test check test-long test-emulated test-compiled bench bench-compile: export PYTHONPATH := $(CURDIR)

# All tests on the kernels that this processor chooses; a file stays in one process, for its fixtures, and they come as
# they are collected: by number of tests the C++ programs, minutes of compiling, would come last. Then those that
# reach CPU kernels on its other instruction sets, some of a GPU's on emulated CUDA kernels, and the benchmarks once each,
# on small inputs, for their checks; these are left out when PYTEST_ARGS asks for certain tests. Threads that wait do not spin: others need the cores.
test check: export OMP_WAIT_POLICY ?= passive
test: $(BUILD_DONE)
	@$(PY) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder -m "not long" $(PYTEST_ARGS)
	@$(if $(PYTEST_ARGS),,$(PY) tests/instruction_sets.py $(JOBS) --quiet)
	@$(if $(PYTEST_ARGS),,$(PY) tests/emulated_cuda.py $(JOBS) --some --quiet -m "not long")
	@$(if $(PYTEST_ARGS),,$(PY) -m pytest benchmarks --benchmark-disable -m "not long" --quiet --numprocesses $(JOBS) --dist worksteal)

# What is tested at a desk, in about two minutes: the kernels that this processor chooses, without what is marked slow
# (compilers, several processes, simulations), the C++ programs and the runs of demo and examples.
check: $(BUILD_DONE)
	@$(PY) -m pytest --numprocesses $(JOBS) --dist loadfile -m "not slow and not long" --quiet \
		--ignore tests/test_cpp.py --ignore tests/test_demo.py --ignore tests/test_examples.py $(PYTEST_ARGS)

# Trainings that are killed and resumed, or of several processes; C++ programs that take minutes to compile; every test of a
# kernel on every instruction set.
test-long: $(BUILD_DONE)
	@$(PY) -m pytest tests benchmarks --benchmark-disable -m long $(PYTEST_ARGS)
	@$(if $(PYTEST_ARGS),,$(PY) tests/instruction_sets.py $(JOBS) --all --quiet)

# All tests of a GPU on CUDA kernels that run on the host: five minutes.
test-emulated: $(BUILD_DONE)
	@$(PY) tests/emulated_cuda.py $(JOBS) -m "not long" $(PYTEST_ARGS)

# The same on what nvcc makes of the kernels: twice five minutes to build them, ten to run.
test-compiled: $(BUILD_DONE)
	@$(PY) tests/emulated_cuda.py $(JOBS) --compiled -m "not long" $(PYTEST_ARGS)

# Five minutes of measurements; results.json, report.md and pictures go to benchmarks/results/cpu. See BENCH_ARGS=--help.
bench bench-compile: export OMP_PROC_BIND ?= true
bench: $(BUILD_DONE)
	$(PY) -m benchmarks --suite summary --out $(BENCH_OUT)/results.json $(BENCH_ARGS)
	$(PY) -m benchmarks.report $(BENCH_OUT)/results.json $(wildcard $(BENCH_OUT)/compile.json)

# Half an hour against torch.compile: compile.json beside the results, one report of both. BENCH_ARGS="--minutes 20" cuts
# it short, with --resume the rest follows.
bench-compile: $(BUILD_DONE)
	$(PY) -m benchmarks --suite compile --out $(BENCH_OUT)/compile.json $(BENCH_ARGS)
	$(PY) -m benchmarks.report $(wildcard $(BENCH_OUT)/results.json) $(BENCH_OUT)/compile.json

demo: $(BUILD_DONE)
	@$(PY) -m fused_losses demo $(DEMO_ARGS)

$(TORCH_DONE):
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)' numpy 'setuptools>=77' wheel 'pybind11>=2.13' ninja
	@rm -f $(VENV)/.done-*
	@touch $@

# Editable: both binaries land in fused_losses/, Python files need no new build.
$(BUILD_DONE): $(TORCH_DONE) $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[test]'
	@rm -f $(VENV)/.done-build*
	@touch $@

$(DEV_DONE): $(TORCH_DONE) pyproject.toml
	$(PIP) --no-build-isolation --editable '.[test,dev]'
	@touch $(BUILD_DONE) $@

# The documentation, with every warning an error, into site/. It imports the package for its signatures.
docs: $(BUILD_DONE)
	$(PY) -m mkdocs build --strict

lint: $(DEV_DONE)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(DEV_DONE)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# For this Python and every torch from 2.11 on, with CUDA kernels where nvcc is found; into dist/, named after the oldest
# C library that its binaries can be loaded with (manylinux_2_34: glibc 2.34).
wheel: $(DEV_DONE)
	@rm -rf build/wheel build/lib*
	$(PY) -m build --no-isolation --wheel --outdir build/wheel
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl

# For every Python at hand, each tested in empty environments. See WHEELS_ARGS=--help.
wheels: $(DEV_DONE)
	$(PY) scripts/build_wheels.py $(WHEELS_ARGS)

clean:
	rm -rf build dist site *.egg-info fused_losses/*.so
	rm -f $(BUILD_DONE) $(DEV_DONE)

distclean: clean
	rm -rf $(VENV)
