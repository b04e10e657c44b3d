# Everything runs from .venv, which is made on first use and touched again only when a requirement changes.
#
#   make chain   the main job on the default model     make check      lint, types and all tests
#   make quick   the quick tests: two minutes          make benchmark  time a sweep beside other libraries
#   make test    all tests, tutorials included         make docs       the API reference, in build/docs
#   make clean   remove the environments           make capabilities  what runs on which model
#   make flips   which verdicts change with BOS, length, seed and prompts (the table of analyses/README.md)
#
# PYTHON=python3.12 picks another interpreter; ARGS="--length 32" adds options to the main job or to pytest;
# WORKERS=4 runs the tests in so many processes.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
OUT ?= runs/first

BIN := $(VENV)/bin
REQUIREMENTS := pyproject.toml constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help chain quick test lint types check format docs benchmark capabilities flips clean
.DELETE_ON_ERROR:

help:
	@sed -n '3,10s/^# *//p' Makefile

chain: $(VENV)/.installed
	$(BIN)/sinklens chain --model smollm2 --target 10 --length 64 --out $(OUT) --force $(ARGS)

# No notebook, no browser, no real model. A file's tests stay in one process, which makes its fixtures once.
quick: $(VENV)/.installed-dev
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not slow and not smollm2 and not browser" tests $(ARGS)

# The order of files is that of tests/conftest.py, the long ones first, and not that of xdist, the many-tested first.
test: $(VENV)/.installed-dev
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --nbmake --nbmake-timeout=600 $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tests.helpers.references

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python -m tests.helpers.api build/docs

benchmark: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmark $(ARGS)

# With both versions of transformer-lens, in which the models are different classes.
capabilities: $(VENV)/.installed-dev .venv-tl4/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m sinklens.analysis.capabilities_page measure build/capabilities-3.json $(ARGS)
	OMP_NUM_THREADS=1 .venv-tl4/bin/python -m sinklens.analysis.capabilities_page measure build/capabilities-4.json $(ARGS)
	$(BIN)/python -m sinklens.analysis.capabilities_page write build/capabilities-3.json build/capabilities-4.json \
	  > build/capabilities.md
	mv build/capabilities.md sinklens/models/README.md

flips: $(VENV)/.installed-dev
	$(BIN)/python -m tests.helpers.flips runs/flips $(ARGS)

clean:
	rm -rf $(VENV) .venv-wheel .venv-tl4

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sinklens needs Python 3.11 or newer; name one, for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The stamps are written last, so an interrupted installation is taken up again.
$(VENV)/.installed: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[viz]'
	@touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(VENV)/.installed $@

.venv-tl4/.installed: $(REQUIREMENTS) Makefile
	$(PYTHON) -m venv .venv-tl4
	sed 's/^transformer-lens==.*/transformer-lens==4.3.0/' constraints.txt > .venv-tl4/constraints.txt
	.venv-tl4/bin/python -m pip install --quiet --constraint .venv-tl4/constraints.txt --editable '.[viz]' \
	  pytest pytest-xdist hypothesis nbmake ipykernel
	@touch $@
