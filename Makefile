# Everything a newcomer, a developer and CI run. `make` alone lists the targets.
# Needs Python >= 3.11 and make; everything else is installed into .venv, and for the tests on a real engine into
# .venv-engines, which `make clean` removes.

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq

# The versions that are tested; pyproject.toml allows more. `make CONSTRAINTS= test` in a fresh checkout tries
# the newest that it allows.
CONSTRAINTS ?= scripts/constraints.txt
INSTALL := $(PIP) install $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

# vLLM pins many versions, so it lives in an environment of its own.
ENGINES := .venv-engines
ENGINES_BIN := $(ENGINES)/bin
ENGINES_STAMPS := $(ENGINES)/.stamps
ENGINES_CONSTRAINTS := scripts/constraints-engines.txt
ENGINES_INSTALL := $(ENGINES_BIN)/python -m pip --disable-pip-version-check --no-input -qq \
	install -c $(ENGINES_CONSTRAINTS)

# The first interpreter on PATH that every dependency has wheels for. `make PYTHON=... test` overrides it.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-faults test-engines lint types layers bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMPS)/demo ## two engine processes share a model's KV through one pool (DEMO_ARGS=...)
	$(BIN)/penstock demo $(DEMO_ARGS)

test: $(STAMPS)/dev $(STAMPS)/servers ## the tests, two files at a time (TEST_ARGS=...)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(TEST_ARGS)

test-faults: $(STAMPS)/dev $(STAMPS)/servers ## the fault tests with their full counts
	PENSTOCK_TEST_SCALE=full $(BIN)/python -m pytest -q -n 2 --dist loadfile -m faults \
		-o timeout=1500 -o faulthandler_timeout=1620 $(TEST_ARGS)

test-engines: $(ENGINES_STAMPS)/tests ## the tests on the real vLLM and SGLang's classes, in .venv-engines (TEST_ARGS=...)
	PENSTOCK_TEST_ENGINES=1 $(ENGINES_BIN)/python -m pytest -q \
		-o timeout=600 -o faulthandler_timeout=720 $(if $(TEST_ARGS),$(TEST_ARGS),tests/engines tests/connectors/sglang)

lint: $(STAMPS)/dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/dev ## mypy --strict
	$(BIN)/mypy --strict src

layers: $(STAMPS)/dev ## imports go downwards only
	$(BIN)/lint-imports

bench: $(STAMPS)/demo ## measure the pool on this machine (BENCH_ARGS=--json)
	$(BIN)/penstock bench pool $(BENCH_ARGS)

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) $(ENGINES) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One chain of stamps an environment: pip never runs twice at once in one, whatever -j says.
$(STAMPS)/venv $(ENGINES_STAMPS)/venv: %/.stamps/venv:
	@test -n "$(PYTHON)" || { echo "penstock needs Python 3.11 to 3.14 and found none on PATH." \
		"Install one, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "penstock needs Python >= 3.11; $(PYTHON) is not. Name another:" \
		"make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" scripts/install.py venv $*
	@mkdir -p $(@D) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv scripts/install.py
	@$(BIN)/python scripts/install.py torch
	@touch $@

$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml $(CONSTRAINTS)
	@echo "installing penstock and what the demo needs"
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/demo
	@echo "installing what the tests and checks need"
	@$(INSTALL) -e '.[demo,dev]'
	@touch $@

# Not root, or no apt: it says so, and the tests that need a server skip.
$(STAMPS)/servers: $(STAMPS)/venv scripts/install.py
	@$(BIN)/python scripts/install.py servers
	@touch $@

$(ENGINES_STAMPS)/vllm: $(ENGINES_STAMPS)/venv scripts/install.py $(ENGINES_CONSTRAINTS)
	@$(ENGINES_BIN)/python scripts/install.py vllm -c $(ENGINES_CONSTRAINTS)
	@touch $@

$(ENGINES_STAMPS)/tests: $(ENGINES_STAMPS)/vllm pyproject.toml scripts/sglang.txt
	@echo "installing penstock and what its tests on engines need"
	@$(ENGINES_INSTALL) -e . pytest pytest-timeout
	@$(ENGINES_INSTALL) --no-deps -r scripts/sglang.txt
	@touch $@
