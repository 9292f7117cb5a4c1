# make demo: install and run the demo.   make test: install and run the whole suite.
# Everything is installed into .venv at the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test soak bench-data lint types style check clean

demo: $(VENV)/installed
	$(BIN)/mocov3 demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

# hours: the tests of reliability with 300 kills and 10,000 fuzzed inputs, and the table of docs/reliability.md
soak: $(VENV)/installed-dev
	$(PIP) --editable ".[soak]"
	$(BIN)/python benchmarks/soak.py

bench-data: $(VENV)/installed-dev
	$(PIP) --editable ".[bench]"
	$(BIN)/python benchmarks/data.py --readme README.md

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .

style: $(VENV)/installed-dev
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

check: test lint style types

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml setup.py constraints.txt mocov3/data/native/views.c | $(VENV)/bin/python
	$(PIP) --editable ".[report]"
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt $(VENV)/installed
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
