# `make quickstart` and `make test` set everything up by themselves; nothing but Python 3.11+ is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST ?= .venv-lowest
# Most tests wait for processes, not for a processor: two of them at a time take little more than half the time. Files
# go out as they are found: by their number of tests, those with few and long ones would come last, one process idle.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
FAST := -m "not slow and not browser"
WORKSPACE ?= workspaces/glyphs

# The folders lie apart from where they are imported; mypy looks at the package as it is shipped.
define types
rm -rf $(VENV)/types && mkdir -p $(VENV)/types/graceful
cp -r graceful/. training indexing evaluation flows $(VENV)/types/graceful/
cd $(VENV)/types && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p graceful
endef

.PHONY: quickstart demo docs test test-fast test-lowest test-wheel lint format benchmarks clean

quickstart: $(STAMP)
	$(BIN)/graceful replay examples/glyphs.toml --root $(WORKSPACE)

demo: $(STAMP)
	$(BIN)/graceful demo

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

test: $(STAMP) lint
	$(BIN)/python -m pytest -q $(PARALLEL) --durations=25

test-fast: $(STAMP)
	$(BIN)/python -m pytest -q $(FAST)

# The lowest versions that pyproject.toml allows, of what it names itself; the tools keep the versions that are pinned.
test-lowest: $(STAMP)
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --output-file $(VENV)/lowest.txt pyproject.toml
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)
	grep -E '^(hypothesis|moto|pytest|pytest-timeout|ranx)==' constraints.txt > $(VENV)/tools.txt
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --constraint $(VENV)/lowest.txt \
	    --constraint $(VENV)/tools.txt --editable . hypothesis 'moto[s3,server]' pytest pytest-timeout ranx
	$(LOWEST)/bin/python -m pytest -q $(FAST) $(TESTS)

# What is shipped, not what lies here: the wheel, in a folder whose own `training` must not be found instead.
test-wheel: $(STAMP)
	$(BIN)/python -m pytest -q tests/test_packaging.py -k wheel

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
	rm -rf $(VENV) $(LOWEST) workspaces .site .pytest_cache .mypy_cache .ruff_cache .hypothesis
