# Every target makes what it needs: `make demo` and `make test` are the two commands of the README.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_VENV ?= .demo-venv
DEMO_OUT ?= kdcli-out/demo

.PHONY: demo test lint docs bench clean

demo: $(DEMO_VENV)/.ready
	@DEMO_OUT=$(DEMO_OUT) PATH="$(abspath $(DEMO_VENV)/bin):$$PATH" bash benchmarks/demo.sh

test: $(VENV)/.ready
	$(BIN)/python tools/gen.py --check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/mypy

docs: $(VENV)/.ready
	$(BIN)/python tools/gen.py

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/pipeline.py

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

$(DEMO_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install -q -c constraints.txt torch==2.13.0
	$(DEMO_VENV)/bin/python -m pip install -q -c constraints.txt ".[demo]"
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) build dist .pytest_cache .mypy_cache .ruff_cache
