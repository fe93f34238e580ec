# SPDX-License-Identifier: Apache-2.0
# make quickstart   environment, model and data, then QLoRA of a real language model
# make test         the test suite, doctests and notebooks included
# make lint         ruff, pyright, import contracts
# make notebooks    colab/*.ipynb from colab/*.py
#
# PYTHON=/path/to/python3.12   which Python to build the environment with
# EXTRAS=train,cuda13          what to install beside the core (cuda12, cuda13: jax for NVIDIA GPUs)
# ARGS='--train.steps 20'      more settings for the quickstart

VENV ?= .venv
EXTRAS ?= train
PIP_ARGS ?=
ARGS ?=
PYTEST_ARGS ?=
BIN := $(VENV)/bin
CONFIG := configs/quickstart.toml

.PHONY: help quickstart test lint format notebooks clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,9s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.installed
	@$(BIN)/jax-qlora train $(CONFIG) $(ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	@failed=; for tool in 'ruff check .' 'ruff format --check .' \
	    'pyright --pythonpath $(BIN)/python' lint-imports; do \
	  $(BIN)/$$tool || failed="$$failed [$$tool]"; \
	done; \
	test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

notebooks: $(VENV)/.installed-dev
	@$(BIN)/jupytext -q --to ipynb --update colab/*.py

clean:
	rm -rf $(VENV) .ci-cache build dist

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing jax_qlora[$(EXTRAS)] into $(VENV); about 1 GB on disk, a few minutes the first time."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS)]' $(PIP_ARGS)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing jax_qlora[$(EXTRAS),fit,dev] into $(VENV); a few minutes the first time."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS),fit,dev]' $(PIP_ARGS)
	@touch $@ $(VENV)/.installed

# The first Python that is new enough and can make environments; `.venv` is only ever made once.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python $(HOME)/.pyenv/versions/3.1[123].*/bin/python); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version) ($$(command -v "$$python"))."; \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "jax_qlora needs Python 3.11 or newer with its venv module." >&2; \
	for python in $(or $(PYTHON),python3 python); do \
	  found=$$("$$python" --version 2>&1) && echo "Found: $$python is $$found." >&2; \
	done; \
	echo "Install one (Debian, Ubuntu: sudo apt install python3.11-venv; macOS: brew install python@3.13)," >&2; \
	echo "or name one: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3.13" >&2; \
	exit 1
