# `make demo` shows relprop at work, `make test` checks it, `make tables` makes the README's tables of methods anew and
# `make census` that of architectures. Each builds the environment it needs in .venv, once.
# Variables: PYTHON, the interpreter to build with; VENV, where to; OUT, where the demo's pictures go; ARGS, for pytest.

SHELL := /bin/bash -o pipefail
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-output
BIN := $(VENV)/bin

# One line for each download instead of pip's whole report; its errors come through, and so does its exit status.
PIP = $(BIN)/python -m pip install --disable-pip-version-check
QUIETLY = | { grep --line-buffered -E '^ *(Downloading .*(whl|gz) \(|Installing)' || true; }

# ruff reads neither setup.cfg nor anything else here, so that these flags are all of its settings:
# pycodestyle, pyflakes, import order, likely bugs, outdated syntax; lambdas may have names, zip may be plain.
RUFF = $(BIN)/ruff check --isolated --line-length 120 --target-version py311 --select E,W,F,I,B,UP --ignore E731,B905

.PHONY: demo test bench tables census lint clean

demo: $(VENV)/.for-demo
	$(BIN)/relprop demo --output $(OUT)

test: $(VENV)/.for-test
	$(BIN)/python -m pytest -n 2 $(ARGS)

bench: $(VENV)/.for-test
	@for script in tests/bench/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

tables: $(VENV)/.for-test
	@for script in demos/benchmark_*.py; do echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

census: $(VENV)/.for-test
	$(BIN)/python demos/census.py $(ARGS)

lint: $(VENV)/.for-test
	$(RUFF) relprop tests demos setup.py

clean:
	rm -rf .venv demo-output build dist relprop.egg-info .pytest_cache .ruff_cache
	find relprop tests demos -name __pycache__ -prune -exec rm -rf {} +

# The stamps are files in the environment: it is built anew only when what setup.cfg asks for has changed.
$(VENV)/.for-demo: setup.cfg setup.py | $(VENV)/bin/python
	@echo "Installing relprop and what it stands on into $(VENV) (PyTorch is a large download) ..."
	$(PIP) --editable . $(QUIETLY)
	@touch $@

$(VENV)/.for-test: setup.cfg setup.py | $(VENV)/bin/python
	@echo "Installing relprop, pytest and ruff into $(VENV) (PyTorch is a large download) ..."
	$(PIP) --editable '.[test]' $(QUIETLY)
	@touch $@ $(VENV)/.for-demo

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "relprop needs Python 3.11 or newer; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip $(QUIETLY)
