# Everything happens in .venv, which is made from nothing: python3 (with venv) and gcc are all that is needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
PYTEST_ARGS ?=
KERNELS ?= 6.1 6.12 7
SOAK_MINUTES ?= 10

.DEFAULT_GOAL := help
.PHONY: help venv build demo test test-kernels soak lint format check bench wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: $(VENV)/.deps ## .venv with all dependencies
$(VENV)/.deps: pyproject.toml setup.py parasite_c/launcher.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q 'setuptools>=77' wheel cffi grpcio-tools
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	@touch $@

SOURCES := $(wildcard images/*.proto parasite_c/*.c parasite_c/*.h parasite_c/*.S parasite_c/*.ld parasite_c/*.py)
build: $(VENV)/.built ## generated messages, blobs and the extension, in place; .venv/bin/snap runs
$(VENV)/.built: $(VENV)/.deps setup.py $(SOURCES)
	$(BIN)/python setup.py -q generate build_ext --inplace
	$(BIN)/python -m compileall -q snapshotter checkpoint store images migrations parasite_c
	@touch $@

demo: build ## a numpy simulation and a shell pipeline: taken every second, killed, rolled back
	$(BIN)/python tests/demo/demo.py

test: build ## all tests but those in other kernels; PYTEST_ARGS adds options
	$(PYTEST) -rs $(PYTEST_ARGS) tests

test-kernels: build ## the kernel tests inside Debian's 6.1, 6.12 and 7 (QEMU; downloads packages); KERNELS, KERNEL_ARGS="-k timers"
	$(BIN)/python -m tests.kernels $(KERNELS) $(KERNEL_ARGS)

soak: build ## stress under the oracle, kills, chaos of commands: SOAK_MINUTES=60 SOAK_ARGS="--piece stress"; prints counts
	$(BIN)/python -m tests.soak --minutes $(SOAK_MINUTES) $(SOAK_ARGS)

lint: build ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv ## rewrite the sources in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## what must pass before a commit

bench: build ## the table of goals; BENCH_ARGS=--json for machines
	$(BIN)/python -m tests.bench $(BENCH_ARGS)

wheel: venv ## dist/*.whl, with the compiled parts inside
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

clean: ## remove everything generated except .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache demo-run $(VENV)/.built
	rm -f images/*_pb2.py images/*_pb2.pyi parasite_c/*.bin parasite_c/*.so parasite_c/*.o parasite_c/_native.c parasite_c/stub
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
