# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test notebooks lint types clean

setup: $(STAMP)

# torch goes first and alone: an unconstrained resolver may replace it by a larger build.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[benchmark,scoring,notebooks,dev]'
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

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
