# Everything there is to type. A fresh machine needs python 3.11 or newer, make, g++ and an index that pip can reach.
#
#   make demo     install, build the bundled model, generate with it, print the report
#   make test     install with the development tools, then every check and every test
#   make check    formatting, lint, types and the floors' imports alone
#   make tamper   alter a signed artifact in every way, and print how each was refused
#   make bench    measure; BENCH="--quick" or BENCH="--models demo --json mine" narrows it
#   make faults   builds with every write, sync and rename failing in turn; FAULTS="--step 10" tries fewer
#   make setup    install only            make clean    remove what make and builds made
#
# On a machine with an NVIDIA GPU, with the packages of PYTHON_GPU (torch, transformers, cuda-bindings, pytest):
#
#   make test-gpu    the tests that need the GPU
#   make bench-gpu   measure on it; BENCH="--models llama-3.2-1b --gpt-fast DIR" narrows or widens it

PYTHON ?= python3
PYTHON_GPU ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INGOT := $(BIN)/ingot
DEMO := artifacts/built/demo
BENCH ?=
FAULTS ?=

.PHONY: help setup demo test check types tamper faults bench test-gpu bench-gpu clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

setup: $(VENV)/installed

# Stamps: as long as neither file changes, a second run does nothing here.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "error: $(PYTHON) is not Python 3.11 or newer; try: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/created
	$(PIP) -e ".[compile]"
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/created
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/installed

demo: setup
	$(INGOT) build recipes/demo.toml -o $(DEMO)
	@echo '--- ingot run $(DEMO) "Once upon a time"'
	@$(INGOT) run $(DEMO) "Once upon a time" --temperature 0.8 --seed 7 --max-tokens 160 --timings
	@echo '--- ingot run $(DEMO) "What is 27 plus 15?" --chat'
	@$(INGOT) run $(DEMO) "What is 27 plus 15?" --chat --temperature 0 --timings
	@echo '--- ingot inspect $(DEMO)'
	@$(INGOT) inspect $(DEMO)

test: check
	$(BIN)/python -m pytest

check: $(VENV)/installed-dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# mypy names a package after its folder. Through this link the root is `ingot` whatever the clone is called.
types: $(VENV)/installed-dev
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/ingot
	cd $(VENV)/types && ../bin/mypy --config-file ingot/pyproject.toml -p ingot

tamper: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -s tests/e2e/test_tampering.py

faults: $(VENV)/installed-dev types
	PYTHONPATH="$(CURDIR)/$(VENV)/types" $(BIN)/python -m ingot.tests.e2e.fault_table $(FAULTS)

bench: setup
	$(BIN)/python -m ingot.benchmarks $(BENCH)

# The GPU machine's own packages are used as they are; `ingot` is found through the link that `types` makes too.
ON_GPU = mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/ingot \
	&& PYTHONPATH="$(CURDIR)/$(VENV)/types:$$PYTHONPATH" $(PYTHON_GPU)

test-gpu:
	$(ON_GPU) -m pytest -m gpu $$(grep -rl --include='test_*.py' 'mark\.gpu' tests)

bench-gpu:
	$(ON_GPU) -m ingot.benchmarks --device cuda $(BENCH)

clean:
	rm -rf $(VENV) artifacts/built build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
