# `make demo` and `make test` each make their own environment first; nothing else is needed but
# Python 3.11 or newer, a compiler and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

ARGS ?=

.PHONY: help demo reproduce test test-slow storm fuzz lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        train, check and export a drafter for the embedded tiny target"
	@echo "make reproduce   the paper's figures, in kind; an hour on 2 cores (ARGS='seeds=3', ...)"
	@echo "make test        lint, format, types and the tests"
	@echo "make test-slow   the slow suites too, with freshly drawn inputs"
	@echo "make storm       30 faults of a training at random moments: kills, cuts, damaged files"
	@echo "make fuzz        damaged input for each reader (FUZZ_SECONDS=600 each, FUZZ_SEED=1)"
	@echo "make clean       remove the environment and caches"

# Remade when the dependencies change. pip takes a torch build that is at hand when the range
# allows it; the newest release may bring several GB of CUDA.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "DeepSpec needs Python 3.11 or newer; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/deepspec train recipe=tiny

reproduce: $(VENV)/.installed
	$(BIN)/deepspec reproduce out=runs/paper $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check deepspec tests data examples benchmarks
	$(BIN)/ruff format --check deepspec tests data examples benchmarks
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: lint
	$(BIN)/python -m pytest --hypothesis-profile=fresh

storm: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses=0 -s -m slow tests/faults

fuzz: $(VENV)/.installed
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) FUZZ_SEED=$(or $(FUZZ_SEED),1) \
	    $(BIN)/python -m pytest -m slow tests/fuzz

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
