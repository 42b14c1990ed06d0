# Each target sets up what it needs: a .venv made by uv, which is bootstrapped by pip. A second run does no set-up work.
PYTHON ?= python3
# where it is set, each of the hundreds of processes that Ray starts would compile all it imports anew
unexport PYTHONDONTWRITEBYTECODE
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHROMIUM_STAMP := $(VENV)/.chromium
POSTGRES_STAMP := $(VENV)/.postgres
DOCS_STAMP := $(VENV)/.docs

.PHONY: help demo tools test test-fast test-all test-core test-cluster coverage mutations check docs results format clean

help:
	@echo "make demo       digits -> StyleGAN manifold -> four classifiers -> attacks -> table, report, MLflow (CPU, minutes)"
	@echo "make test       the tests, with a real local Ray and MLflow; what CI runs"
	@echo "make tools      Debian's chromium and postgresql, which two tests use where they can be installed; make test does this, too"
	@echo "make test-fast  those of them that take no Ray and a second or two at most (two minutes)"
	@echo "make test-all   also those that take minutes each, or check at more places (an hour and more)"
	@echo "make coverage   lines of the core that tests without Ray reach"
	@echo "make mutations  wrong signs, clamps and budgets, each of which a test must notice (minutes)"
	@echo "make check      ruff, mypy, and the direction of imports"
	@echo "make docs       the documents as a site, in build/site; a broken link is an error"
	@echo "make format     ruff format"
	@echo "make clean      removes .venv, the site and caches; results in runs/ stay"
	@echo "make results    the study on MNIST-5k, docs/results and the README's second table anew (hours); SEEDS=1: each method once; with CIFAR10=FOLDER also in colour"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("dmat_ray needs Python 3.11 or newer, %s is %s" % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV): about 6 GB, a minute or a few"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python jobs/pipeline.py --preset demo

# What tests/reports/test_page_in_browser.py opens the page in; the test is skipped without one.
$(CHROMIUM_STAMP): | $(STAMP)
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome; do command -v "$$name" >/dev/null 2>&1 && exit 0; done; \
	command -v apt-get >/dev/null && test "$$(id -u)" = 0 || exit 0; \
	echo "installing Debian's chromium, in which a test opens the report"; \
	(apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 \
		|| echo "chromium cannot be installed, and its test is skipped; later: apt-get install chromium"
	@touch $(CHROMIUM_STAMP)

# What tests/cluster/test_tune.py puts behind its MLflow server, which else has sqlite. Debian starts a server of its own; ours is another.
$(POSTGRES_STAMP): | $(STAMP) $(CHROMIUM_STAMP)
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 && { touch $(POSTGRES_STAMP); exit 0; }; \
	command -v apt-get >/dev/null && test "$$(id -u)" = 0 || exit 0; \
	echo "installing Debian's postgresql, which a test puts behind an MLflow server"; \
	(apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql) >/dev/null 2>&1 \
		|| echo "postgresql cannot be installed, and sqlite takes its place; later: apt-get install postgresql"
	@touch $(POSTGRES_STAMP)

tools: $(CHROMIUM_STAMP) $(POSTGRES_STAMP)

# Those that start clusters run one after the other and come first; all others, a process a core, have what these leave idle.
WHICH := not exhaustive
EVERY := exhaustive or not exhaustive
ALONE := --numprocesses auto --maxprocesses 8 --ignore tests/cluster
test: $(STAMP) tools
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-core test-cluster

test-all:
	@$(MAKE) --no-print-directory test WHICH="$(EVERY)"

test-core: $(STAMP)
	@nice -n 10 $(BIN)/python -m pytest $(ALONE) -m "$(WHICH)" --durations 12

test-cluster: $(STAMP)
	@$(BIN)/python -m pytest tests/cluster -m "$(WHICH)" --durations 12

test-fast: $(STAMP)
	@$(BIN)/python -m pytest $(ALONE) -m "not slow and not exhaustive" -q

mutations: $(STAMP)
	@$(BIN)/python tests/mutations.py

coverage: $(STAMP)
	@$(BIN)/python -m pytest --ignore tests/cluster -m "not exhaustive" -q --cov --cov-report=term:skip-covered

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_imports.py -m "not slow"

# The tool that makes the site (extra docs) is not among what the other targets set up.
$(DOCS_STAMP): pyproject.toml constraints.txt | $(STAMP)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[docs]'
	@touch $(DOCS_STAMP)

# The study on MNIST-5k from nothing: hours on 2 cores; goes on where it was stopped.
results: $(STAMP)
	@PYTHON=$(BIN)/python benchmarks/results.sh

docs: $(DOCS_STAMP)
	@$(BIN)/python docs/build_site.py

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Not runs/, which holds results.
clean:
	rm -rf $(VENV) build .cache .mypy_cache .ruff_cache .pytest_cache
