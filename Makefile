# `make demo` and `make test` need Python 3.11 or newer, make and git; they install the rest into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
JOBS ?= 2

.PHONY: demo test check lint types imports format clean

demo: $(VENV)/installed
	$(BIN)/burnish demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses $(JOBS)

# What continuous integration runs.
check: $(VENV)/installed-dev lint types imports test

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check src tests tools
	$(BIN)/ruff check src tests tools

types: $(VENV)/installed-dev
	$(BIN)/mypy

imports: $(VENV)/installed-dev
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff format src tests tools
	$(BIN)/ruff check --fix src tests tools

clean:
	rm -rf $(VENV) runs

# torch goes first and by its exact version: a range would let another build in.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	@touch $@
