# Every target sets itself up from a fresh clone: a virtual environment, a constrained install, a build.
#
#   make demo      draw pictures with a small Janus, full cache beside compressed -> demo/
#   make test      all tests that need no GPU
#   make test-serve  the tests that need a browser, a Ray cluster or many processes
#   make simulation  all contract tests of the CUDA and Triton kernels, from their PTX on the CPU; takes long
#   make gpu       first contact with a CUDA GPU: tests, times, sanitizers, with the Python at hand and offline -> $(OUT)
#   make serve     answer OpenAI's image clients with the included model, at http://127.0.0.1:8000 -> README.md
#   make bench     the CPU benchmarks: kernel, decoder steps, pictures -> bench/results/, README.md
#   make quality   scores and fidelity of the included model, full cache beside compressed -> docs/quality.md
#   make policies  every policy at every budget, with the included model; long -> docs/policy-results.md
#   make pins      refresh the pinned releases of everything the others install, and say what moved -> constraints/cpu.txt
#   make compat    the essential checks with older and newer releases, and other Pythons -> docs/compatibility.md
#   make newest    the same with the newest release of everything: what would break
#   make lint      ruff, mypy --strict, clang-format       (make format repairs what can be repaired)
#
# On a machine with a GPU, `make test CONSTRAINTS=` takes torch as pip finds it, not the CPU build.

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

POLICY      ?= ssd_guarded
SEEDS       ?= 1
OUT         ?= gpu
COMPAT      ?= --write docs/compatibility.md
COMPARE     ?= --fidelity-prompts 6 --prompts 30
WORKERS     ?= -n auto --maxprocesses 16
STEPS       ?=
SECONDS     ?=

BIN         := $(VENV)/bin
PIP         := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
BUILD_TOOLS := 'setuptools>=77' 'pybind11>=2.13,<4' ninja 'cmake>=3.24'
SOURCES     := $(shell find csrc -type f)
CXX_SOURCES := $(filter %.h %.cpp %.cuh %.cu,$(SOURCES)) $(wildcard tests/*/*.cpp $(addprefix tests/kernels/*/*.,cpp h cuh))

.PHONY: demo serve test test-serve simulation gpu bench quality policies lint format pins compat newest clean

# Passive waiting: on a busy machine, threads that spin while they wait can turn seconds into minutes.
demo: export OMP_WAIT_POLICY := passive
demo: $(VENV)/.built
	$(BIN)/ssd-janus demo --out demo

serve: export OMP_WAIT_POLICY := passive
serve: $(VENV)/.built
	$(BIN)/ssd-janus serve

test: export OMP_WAIT_POLICY := passive
test: $(VENV)/.built
	$(BIN)/python -m tests.kernels.ptx.build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(WORKERS)

# Debian's Chromium where no browser is there. Playwright drives it and downloads none. torchao lies apart: transformers
# imports it wherever it finds it.
test-serve: export OMP_WAIT_POLICY := passive
test-serve: $(VENV)/.built
	@command -v chromium chromium-browser google-chrome > /dev/null \
		|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	@test -d build/torchao || $(PIP) --no-deps --target build/torchao torchao
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m serve

# Installs nothing: a machine with a GPU brings its own torch, Triton and pytest. `make gpu STEPS="smoke kernel"` runs
# some parts, `make gpu SECONDS=1800` gives every step more time.
gpu:
	$(PYTHON) tools/gpu_first.py --build --out $(OUT) $(if $(SECONDS),--seconds $(SECONDS)) \
		$(addprefix --step ,$(if $(STEPS),extension $(STEPS)))

# Every parameter of the contract tests on the executor of PTX, Triton's code for two architectures: in lockstep, and with
# threads, blocks, stores and copies as late as may be. `make simulation SCHEDULES=eager` runs one schedule only. Last,
# all that `make gpu` runs, on a pretended GPU.
SCHEDULES ?= lockstep adversarial
simulation: export OMP_WAIT_POLICY := passive
simulation: export OMP_NUM_THREADS := 1
simulation: $(VENV)/.built
	$(BIN)/python -m tests.kernels.ptx.build
	for schedule in $(SCHEDULES); do SSD_PTX_SCHEDULE=$$schedule $(BIN)/python -m pytest -q $(WORKERS) tests/kernels \
		-k ptx -m 'not gpu' || exit 1; done
	SSD_PTX_ARCHITECTURE=90 $(BIN)/python -m pytest -q $(WORKERS) tests/kernels -k ptx_triton -m 'not gpu'
	$(BIN)/python -m pytest -q tests/packaging/test_gpu_steps.py -m exhaustive

bench: $(VENV)/.built
	$(BIN)/ssd-bench suite --readme README.md

# A run that was stopped goes on where it was; `rm -r quality` starts anew.
quality: export OMP_WAIT_POLICY := passive
quality: $(VENV)/.built
	$(BIN)/ssd-janus evaluate --suite shapes --policy full --policy $(POLICY) --budget 0.2 --budget 0.5 --seeds $(SEEDS) \
		--out quality/shapes --page docs/quality.md
	$(BIN)/ssd-janus evaluate --suite fidelity --policy full --policy $(POLICY) --budget 0.2 --budget 0.5 \
		--out quality/fidelity --page docs/quality.md

# Goes on where it was too; `make policies COMPARE="--fidelity-prompts 6 --part fidelity"` measures only some of it.
policies: export OMP_WAIT_POLICY := passive
policies: $(VENV)/.built
	$(BIN)/ssd-janus compare --out runs/policies --page docs/policy-results.md --plots docs $(COMPARE)

lint: $(VENV)/.built $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix
	$(BIN)/clang-format -i $(CXX_SOURCES)

# Other releases of what this builds on, from folders that are kept (SSD_COMPAT_CACHE, else build/compat: gigabytes).
# `make compat COMPAT=` only prints the table; `make compat COMPAT="--only triton"` only some of it.
compat: $(VENV)/.built
	$(PIP) uv
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/compat.py $(COMPAT)

newest: $(VENV)/.built
	$(PIP) uv
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/compat.py --newest

pins: | $(BIN)/python
	$(PIP) uv "tomli; python_version < '3.11'"
	PATH="$(BIN):$$PATH" $(BIN)/python tools/pins.py

clean:
	rm -rf build ssd_kernels/_C.*.so $(VENV)/.installed $(VENV)/.built $(VENV)/.lint

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes before the rest and alone: only it may come from the index of CPU builds (PyPI's own build for Linux is the
# CUDA one, gigabytes more). Where that index cannot be reached, pip says so and takes what else it finds.
$(VENV)/.installed: pyproject.toml setup.py $(CONSTRAINTS) | $(BIN)/python
	@echo "== installing into $(VENV) (a minute or two)"
	$(PIP) $(BUILD_TOOLS)
	$(PIP) --no-deps $(if $(CONSTRAINTS),--extra-index-url $(TORCH_INDEX) --retries 1 --timeout 30) 'torch>=2.11'
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.built: $(VENV)/.installed CMakeLists.txt $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.lint: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) ruff mypy clang-format
	@touch $@
