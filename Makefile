# What a contributor runs. `make` alone lists it.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8080
SECONDS ?= 20
SEED ?= 1
BIN = .venv/bin
COVERAGE = $(BIN)/coverage
# Tests wait more than they work: more workers than processors pay. A few tests begin sooner without any.
WORKERS ?= $(if $(ARGS),0,4)
PYTEST = pytest --numprocesses $(WORKERS) --dist worksteal \
	$(if $(ORDER),--random-order-bucket=module --random-order-seed=$(ORDER))

# Where it is set, as it is in many containers, each run of the tests would compile all of them again.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
# Two installs into one .venv at a time break it.
.NOTPARALLEL:
.PHONY: help demo test test-all lint format docs screenshots stress bench dist clean

help:
	@echo "make demo [PORT=8080] [HOST=...] [DATA=...] [DSN=...]  serve the demo on a PostgreSQL of its own"
	@echo "make test [ARGS=...] [WORKERS=4] [ORDER=seed]  run the tests but the slow ones"
	@echo "make test-all [the same]         run all tests, and measure their coverage"
	@echo "                                 (ZPGPOOL_TEST_DSN=...: against that server)"
	@echo "make lint | format               check | rewrite the code's form, check its types"
	@echo "make docs                        build the documentation into docs/_build/html"
	@echo "make screenshots                 draw and take the pictures of the documentation (needs Chromium)"
	@echo "make stress [SECONDS=20] [SEED=1] [SCENARIO=...]  attack the pools while threads use them"
	@echo "make bench [QUICK=1]             measure the pools beside the others (QUICK: for breakage only)"
	@echo "make dist                        build the wheel and the sdist into dist/, and check them"
	@echo "make clean                       remove what the above made"

demo: .venv/demo.stamp
	@exec $(BIN)/zpgpool demo --host $(HOST) --port $(PORT) $(if $(DATA),--data "$(DATA)") $(if $(DSN),--dsn "$(DSN)")

test: .venv/test.stamp
	$(BIN)/python -m $(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/test-all.stamp
	@rm -f .coverage .coverage.*
	$(COVERAGE) run -m $(PYTEST) $(ARGS)
	@$(COVERAGE) combine --quiet
	@$(COVERAGE) report
	@$(if $(ARGS),:,$(COVERAGE) report --fail-under=100 --include='$(CORE)' >/dev/null || \
		{ echo "The core (CORE in the Makefile) must be covered to 100 %."; exit 1; })

# What everything else rests on (docs/design.rst).
CORE = */interfaces.py,*/events.py,*/settings.py,*/errors.py,*/dsn.py,*/registry.py,*/core/*.py

lint: .venv/lint.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell -D - -D docs/words.txt
	$(BIN)/mypy

format: .venv/format.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/docs.stamp
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs docs/_build/html
	@echo "Read docs/_build/html/index.html"

screenshots: .venv/test.stamp
	$(BIN)/python docs/drawings.py
	PYTHONPATH=tests:. $(BIN)/python docs/screenshots.py

stress: .venv/stress.stamp
	PYTHONPATH=. $(BIN)/python tests/stress.py --seconds $(SECONDS) --seed $(SEED) $(if $(SCENARIO),--scenario $(SCENARIO))

bench: .venv/bench.stamp
	QUICK=$(QUICK) $(BIN)/python -m benchmarks

dist: .venv/dist.stamp
	rm -rf dist build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-manifest

clean:
	rm -rf .venv build dist docs/_build .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf bin parts eggs develop-eggs .installed.cfg src/*.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "zpgpool needs Python 3.10 or newer: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
		{ echo "Python's venv is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "Making .venv ..."
	@$(PYTHON) -m venv .venv

.venv/%.stamp: pyproject.toml .venv/bin/python
	@echo "Installing what 'make $*' needs into .venv ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
