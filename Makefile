# `make quickstart` and `make test` set everything up by themselves; nothing but Python 3.11+ is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKSPACE ?= workspaces/digits

# The folders lie apart from where they are imported; mypy looks at the package as it is shipped.
define types
rm -rf $(VENV)/types && mkdir -p $(VENV)/types/graceful
cp -r graceful/. training indexing evaluation flows $(VENV)/types/graceful/
cd $(VENV)/types && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p graceful
endef

.PHONY: quickstart test test-fast lint format benchmarks clean

quickstart: $(STAMP)
	$(BIN)/graceful replay examples/digits.toml --root $(WORKSPACE)

test: $(STAMP) lint
	$(BIN)/python -m pytest -q --durations=15

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow and not browser"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(types)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(STAMP)
	$(BIN)/python -m benchmarks

# uv installs four to six times faster than pip; pip brings uv. Compiling takes half a minute once and saves ten seconds
# in every process where Python may not write bytecode; Ray and Prefect start many.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) workspaces .pytest_cache .mypy_cache .ruff_cache .hypothesis
