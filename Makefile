# Every target sets itself up: `.venv` is made once and renewed when the pins change. `make demo`
# installs what the demo needs, the others everything: the rest comes into the same `.venv`.
#   PYTHON=python3.12       the Python that makes .venv (3.10 or newer)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                           where pip finds torch's small CPU build; PyPI's Linux build of the
#                           same version brings CUDA libraries (several GB) and works as well
#   PIP_ARGS=...            anything else for pip
# `make gpu VENV= PYTHON=python3` installs nothing and uses that Python as it is.

PYTHON ?= python3
TORCH_INDEX ?=
PIP_ARGS ?=
PYTEST_ARGS ?=
GPU_ARGS ?=
CLIENTS_ARGS ?=
OUT ?= .cache/perf
BASE ?=
GATE_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_FOR_DEMO := $(VENV)/.installed-demo
DEMO_EXTRAS := cpu,build,export,index
PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-clients check lint types sizes docs bench perf-gate gpu tune kernels train clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## make .venv and install everything into it (the others do it too)

demo: $(or $(wildcard $(INSTALLED)),$(INSTALLED_FOR_DEMO)) ## scenes -> export -> build -> index -> rerank: the table and demo-out/index.html
	$(BIN)/edje demo

# A worker a core; a file's tests stay together, for they share what takes long to make. A worker
# that dies is not replaced: pytest-xdist 3.8 would give its tests away and wait for them for ever.
# A test that hangs ends its worker, after every stack of it was printed.
test: $(INSTALLED) ## run the whole test suite (no GPU, no network)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0 \
		--timeout 600 --timeout-method thread $(PYTEST_ARGS)

test-clients: $(INSTALLED) ## ask a real server with the SDKs people have, fuzz it, test the adapters and Ray (network, minutes)
	$(BIN)/python tests/clients/run.py $(CLIENTS_ARGS)

check: lint types sizes ## ruff, mypy --strict, the import layers, the limits of the house
	$(BIN)/pytest -q tests/test_layers.py tests/test_house.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The repository root is the package, so mypy needs a folder that holds `edje`. It must be hidden:
# mypy would follow the link in any other folder back into itself.
types: $(INSTALLED)
	@mkdir -p .mypy && ln -sfn .. .mypy/edje
	cd .mypy && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p edje

sizes: $(INSTALLED)
	$(BIN)/python .ci/house_report.py

docs: $(INSTALLED) ## write the API page of the public names into build/docs
	$(BIN)/python .ci/api_docs.py build/docs

bench: $(INSTALLED) ## the peers, cost a pair, latencies, a cold start (8 minutes; OUT=folder of the JSON)
	$(BIN)/edje bench suite --out $(OUT)

perf-gate: $(INSTALLED) ## is this checkout slower than BASE (a git ref; default origin/main or HEAD~1)?
	$(BIN)/edje bench gate $(if $(BASE),--base '$(BASE)') $(GATE_ARGS)

# Without .venv nothing is installed: the package is found through the link that `types` uses, and the
# C file is compiled here, where there is a compiler.
gpu: $(if $(VENV),$(INSTALLED)) ## measure all that needs an NVIDIA GPU (9 minutes; GPU_ARGS=--help)
	@mkdir -p .mypy && ln -sfn .. .mypy/edje
	$(if $(VENV),,-cc -O3 -shared -fPIC -I"$$($(PYTHON) -c 'import sysconfig as s; print(s.get_path("include"))')" \
		runtime/store/unlocked.c -o runtime/store/_unlocked.abi3.so)
	$(if $(VENV),$(BIN)/python,PYTHONPATH='$(CURDIR)/.mypy' $(PYTHON)) -m edje.perf.gpu_run $(GPU_ARGS)

tune: $(if $(VENV),$(INSTALLED)) ## time the GPU kernels' tiles on the GPU at hand (90 s), into kernels/tuning
	@mkdir -p .mypy && ln -sfn .. .mypy/edje
	$(if $(VENV),$(BIN)/python,PYTHONPATH='$(CURDIR)/.mypy' $(PYTHON)) -m edje.perf.gpu_tune $(GPU_ARGS)

kernels: $(INSTALLED) ## compile the GPU kernels for every architecture (no GPU, minutes)
	$(BIN)/python -m edje.kernels.build
	$(BIN)/python -m edje.kernels.cuda_build

train: $(INSTALLED) ## train the demo's model again (hours on two cores, resumable)
	$(BIN)/python -m edje.demo.training

clean: ## remove .venv and everything that runs have written
	rm -rf $(VENV) .mypy .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks .cache \
		build dist demo-out *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes last into a new .venv: where it is missing, an earlier try was cut short.
# --no-compile: Python compiles the few modules that are used on their first import, in seconds;
# pip would compile all of torch and transformers, which takes longer than the rest of the install.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "edje needs Python 3.10 or newer; name one with PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -e '.[$(1)]' -c constraints.txt \
		$(PIP_INDEX) $(PIP_ARGS)
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,dev)
	@touch $@

$(INSTALLED_FOR_DEMO): pyproject.toml constraints.txt
	$(call install,$(DEMO_EXTRAS))
	@touch $@

.NOTPARALLEL: # two installations at a time would spoil one .venv
