# Farshore. Every target brings what it needs: Python 3.11+, make, bash and a package index are enough.
#
#   make demo              the main job, live, until Ctrl-C     (make demo ARGS=--exit ends by itself)
#   make test              the short tests
#
# `make help` lists the rest. What is installed stays in .venv/ and build/.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

ROOMS := domain plans contract replication providers activities workflows workers lab
VENV := .venv
BIN := $(VENV)/bin
LOCKED := $(VENV)/.locked
INSTALLED := $(VENV)/.installed
TYPES := build/types/farshore

# The interpreter that .venv is made of: the first of these that is 3.11 or newer. `make PYTHON=/path/to/python …` decides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$p"; break; fi; done)

# pytest processes side by side (three keep two cores busy: they wait for servers). A test file stays in one process, so its module-wide servers start once.
JOBS ?= 3
# Whole stacks (Temporal, two sites, three workers) side by side.
STACKS ?= 2
# More arguments: to pytest (make test ARGS="-k lint -x"), to the demo (make demo ARGS=--exit).
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pyright's launcher never asks the network whether there is a newer pyright.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

##@ The two that a newcomer needs
.PHONY: demo test
demo: install ## protect a three-tier application, rehearse, fail over, prove it byte for byte
	$(BIN)/python -m farshore.lab.demo $(ARGS)

test: install ## short tests
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile --ignore tests/e2e $(ARGS)
	@# Whole stacks after the rest, and few at once. 5: ARGS chose none of them.
	$(BIN)/python -m pytest -m "not slow" -n $(STACKS) --dist worksteal tests/e2e $(ARGS) || [ $$? = 5 ]

##@ Checks
.PHONY: check lint types imports test-slow test-tools bench
check: lint types imports test ## everything that CI checks before the demo

lint: install ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install links ## pyright, strict, over the rooms as they are imported
	$(BIN)/pyright --warnings

imports: install ## who may import whom (.importlinter)
	$(BIN)/lint-imports --no-cache

test-slow: install ## the long versions of the tests
	$(BIN)/python -m pytest -m slow $(ARGS)

test-tools: ## foreign clients that some tests talk to (root and apt-get; npm): the tests skip without them
	bash .ci/test-tools

bench: install ## measurements of benchmarks/, written to build/bench/
	mkdir -p build/bench
	shopt -s nullglob; files=(benchmarks/bench_*.py); \
	if [ $${#files[@]} = 0 ]; then echo "benchmarks/ holds no bench_*.py yet"; fi; \
	for f in "$${files[@]}"; do echo "== $$f"; $(BIN)/python "$$f" $(ARGS) | tee "build/bench/$$(basename "$$f" .py).txt"; done

##@ Upkeep
.PHONY: install links format lock clean distclean help
install: $(INSTALLED) ## virtual environment with the locked dependencies and Farshore itself, editable

format: install ## ruff: repair what it can, then format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

UV_COMPILE = $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-config \
	--no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet
lock: install ## write requirements.lock and docker/requirements.lock anew (make lock ARGS=--upgrade for newer releases)
	$(UV_COMPILE) --all-extras $(ARGS) -o requirements.lock
	@rm -f docker/requirements.lock
	$(UV_COMPILE) --extra vsphere --extra azure --extra lab --extra build \
		--constraints requirements.lock -o docker/requirements.lock

clean: ## remove what builds, tests and checkers leave behind (keeps .venv and downloaded tools)
	rm -rf build/types build/bench build/ci build/lib build/bdist.* dist farshore.egg-info \
		.pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -not -path './build/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment and downloaded tools as well
	rm -rf $(VENV) build

help: ## this list
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# --- how .venv comes to be -------------------------------------------------------------------------------------------

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "Farshore needs Python 3.11 or newer; none of python3, python3.11 … python3.14 is. Name one: make PYTHON=/path/to/python" >&2; \
		exit 1; fi
	@echo "[venv] $$($(PYTHON) --version) → $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "Python could not make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }

# Every file that pip takes must have a hash of the lock. An unchanged lock is not installed again.
$(LOCKED): requirements.lock | $(BIN)/python
	@echo "[venv] locked dependencies"
	@$(BIN)/python -m pip install -qq --require-hashes -r requirements.lock
	@touch $@

# Editable by setuptools' import hook: a new module is seen at once; a new package needs a line in pyproject.toml.
$(INSTALLED): pyproject.toml $(LOCKED)
	@echo "[venv] farshore, editable"
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --no-index -e .
	@touch $@

# Type checkers cannot follow the import hook. They read this farm of links instead (docs/decisions/001-layout.md).
links:
	@mkdir -p $(TYPES)
	@for room in $(ROOMS); do [ -L "$(TYPES)/$$room" ] || ln -s "../../../$$room" "$(TYPES)/$$room"; done
