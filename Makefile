# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test notebooks lint types docs linkcheck clean

setup: $(STAMP)

# torch goes first and alone: an unconstrained resolver may replace it by a larger build.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[benchmark,scoring,notebooks,dev,docs]'
	@touch $(STAMP)

demo: setup
	$(BIN)/anomalib-gen demo

# A process for each core, 8 at most. Neighbours in a file tend to share a fitted detector: a process gets one run of
# the tests, and takes over some of another's when it is done with its own.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# At full settings, with their figures, as HTML; minutes each on two cores.
notebooks: setup
	$(BIN)/python notebooks/run.py anomalib-gen-notebooks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Strict: a reference that leads nowhere, or a docstring that does not render, is an error.
docs: setup
	$(BIN)/python -m sphinx -b html -W --keep-going -n -q docs docs/_build/html
	@echo "The site is docs/_build/html/index.html"

# Lists links to other sites that do not answer; needs a network, and is for people to read.
linkcheck: setup
	$(BIN)/python -m sphinx -b linkcheck -q docs docs/_build/linkcheck

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist docs/_build docs/api docs/results
