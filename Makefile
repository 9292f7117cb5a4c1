# make demo: install and run the demo.   make test: install and run the whole suite.
# make test-fast: the quick part of the suite, under 90 s.   make lint-all: style, lint, types and the plan of the house.
# make docs: the site, into build/site.   make wheel-test: a wheel, installed into an empty environment, runs a short demo.
# Everything is installed into .venv at the tested versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

# test files run beside each other, on at most 4 cores
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(len(getattr(os, 'sched_getaffinity', lambda _: range(os.cpu_count()))(0)), 4))")

.PHONY: demo test test-fast versions golden soak gpu bench-data lint lint-all types style flags docs wheel-test check clean

demo: $(VENV)/installed
	$(BIN)/mocov3 demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# an hour: every recorded run in both precisions, and in float32 with fewer of the processor's instructions
golden: $(VENV)/installed-dev
	$(BIN)/python tools/goldens.py

# what took less than a second or so when tests/recorded/slow.txt was made (tools/slow_tests.py); for a developer's loop
test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses $(WORKERS) --dist load

# the quick part in fresh environments with the oldest, two middle and the newest versions: docs/releases.md
versions: | $(VENV)/bin/python
	$(BIN)/python tools/versions.py

# hours: the tests of reliability with 300 kills and 10,000 fuzzed inputs, and the table of docs/reliability.md
soak: $(VENV)/installed-dev
	$(PIP) --editable ".[soak]"
	$(BIN)/python benchmarks/soak.py

# one GPU, under 45 minutes: what a CPU cannot measure, into docs/gpu.md; without a GPU every part is skipped
gpu: $(VENV)/installed-dev
	$(PIP) --editable ".[bench]"
	$(BIN)/python benchmarks/gpu.py

bench-data: $(VENV)/installed-dev
	$(PIP) --editable ".[bench]"
	$(BIN)/python benchmarks/data.py --readme README.md

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .

style: $(VENV)/installed-dev
	$(BIN)/ruff format --check .

lint-all: lint style types
	$(BIN)/python -m pytest -q tests/test_architecture.py -k "room or down or circles or machine"

types: $(VENV)/installed-dev
	$(BIN)/mypy

# the page of flags, from the configuration; a test says when it is stale
flags: $(VENV)/installed
	$(BIN)/python tools/flags.py

docs: $(VENV)/installed-dev
	$(BIN)/python -m mkdocs build --strict

wheel-test: | $(VENV)/bin/python
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt build/wheel/*.whl
	cd build/wheel && venv/bin/mocov3 --version && venv/bin/mocov3 demo --epochs 1 --output-dir demo
	cd build/wheel && venv/bin/mocov3 inspect demo/checkpoint_0000.pth.tar
	rm -rf build/wheel/venv

check: test lint style types docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml setup.py constraints.txt mocov3/data/views/native/views.c | $(VENV)/bin/python
	$(PIP) --editable ".[report]"
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt $(VENV)/installed
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
