# `make demo` and `make test` share one .venv, created on first use with everything they need.
VENV := .venv
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
DEMO ?= demo
# Two test processes with one thread each: tiny tensors gain nothing from more threads.
TEST_PROCESSES ?= 2

.PHONY: help setup demo test check clean

help:
	@echo "make setup   create $(VENV) and install detdistill with its development tools"
	@echo "make demo    train, distil and compare on built-in data; writes $(DEMO)/study/report.html"
	@echo "make test    run the tests"
	@echo "make check   ruff, format check, mypy"
	@echo "make clean   remove $(VENV), caches and the demo"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "detdistill needs Python 3.11 or newer; none was found" >&2; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/detdistill demo --out $(DEMO)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(TEST_PROCESSES)

check: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache
