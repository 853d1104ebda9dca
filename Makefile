# Every target sets up what it needs: on a fresh machine `make demo` and `make test` are enough.

PYTHON ?= python3
VENV ?= .venv
PARITY_VENV ?= .venv-parity
BENCH_ARGS ?=
# Each process may take 3 GB.
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARITY_READY := $(PARITY_VENV)/.ready
PARITY_REQUIREMENTS := tests/parity/requirements.txt
PARITY_ALONE := tests/parity/requirements-alone.txt

# The folders are reached through src/isthmus/, where relative imports are what they will be in the wheel.
SOURCES := $(wildcard src/isthmus/*.py) $(addprefix src/isthmus/,exporter targets models calibration) tests benchmarks training

.PHONY: help demo test matrix architectures goldens check kernels parity bench clean

help:
	@echo "make demo     set up, export dit-digits to ONNX Runtime, and print where its report is"
	@echo "make test     set up, run the tests"
	@echo "make matrix   the sweep of models, targets and precisions whose parts take long"
	@echo "make architectures  export every tiny model to every target, and make docs/architectures.md of it"
	@echo "make goldens  write the operator counts of tests/goldens/operators.json anew"
	@echo "make check    ruff (lint and format), mypy, import-linter"
	@echo "make parity   compare the models with diffusers', in an environment of their own"
	@echo "make kernels  compile every GPU kernel, and compare registers and spills with the recorded ones"
	@echo "make bench    run the benchmarks; BENCH_ARGS=--quick for a small run"
	@echo "make clean    remove the environments, outputs and caches"

demo: $(READY)
	$(BIN)/isthmus export dit-digits --target onnxruntime -o out/dit-digits --force
	@echo
	@echo "The report, for a browser: $(CURDIR)/out/dit-digits/report.html"

# Each process has a core: threads that wait for another's would slow both.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses=$(TEST_PROCESSES) --dist=loadgroup --durations=20

test: $(READY)
	$(PYTEST) -m "not matrix" $(PYTEST_ARGS)

matrix: $(READY)
	$(PYTEST) -m matrix $(PYTEST_ARGS)

architectures: $(READY)
	rm -rf out/cells
	ISTHMUS_CELLS=$(CURDIR)/out/cells $(PYTEST) tests/test_small_models.py -k on_every_target
	PYTHONPATH=src $(BIN)/python tests/architectures.py out/cells docs/architectures.md

goldens: $(READY)
	ISTHMUS_GOLDENS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:randomly tests/exporter/passes/test_optimise.py -k golden_file

check: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

kernels: $(READY)
	$(BIN)/python -m isthmus.exporter.ops.gpu --golden tests/goldens/kernels.json --check

parity: $(PARITY_READY)
	PYTHONPATH=src $(PARITY_VENV)/bin/python -m pytest -q --override-ini=filterwarnings=default tests/parity

bench: $(READY)
	@set -e; for file in $(filter-out benchmarks/held_out.py,$(wildcard benchmarks/*.py)); do echo "$$file" >&2; $(BIN)/python $$file $(BENCH_ARGS); done

clean:
	rm -rf $(VENV) $(PARITY_VENV) .venv-modelopt out dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not a Python of version 3.11 or later. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(1) || \
		{ echo "error: $(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --constraint constraints.txt pip
endef

$(READY): pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,kernels,coreml,coreai,tensorrt-rtx,perceptual]' --group dev
	$(BIN)/python -m isthmus.exporter.ops.native --optional
	@touch $@

$(PARITY_READY): $(PARITY_REQUIREMENTS) $(PARITY_ALONE) constraints.txt
	$(call make_venv,$(PARITY_VENV))
	$(PARITY_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --requirement $(PARITY_REQUIREMENTS)
	$(PARITY_VENV)/bin/python -m pip install --quiet --no-deps --requirement $(PARITY_ALONE)
	@touch $@
