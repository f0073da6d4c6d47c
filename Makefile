# `make demo` and `make test` set up all they need: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test check format bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fastcompat needs Python 3.11 or newer (make PYTHON=python3.12 ...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The whole job on the embedded corpus and model; nothing reaches the network.
demo: install
	rm -rf demo-run demo-run-corpus
	HF_HUB_OFFLINE=1 $(BIN)/fastcompat demo --output demo-run

# One torch thread a worker: two processes of two threads each would fight over two cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# This machine against the loops that everybody writes; takes minutes, writes bench/results.
bench: install
	$(BIN)/python bench/end_to_end.py

clean:
	rm -rf .venv build *.egg-info src/*.egg-info
