# Everything a developer or a user of a clone types; `make help` lists it. Needs Python 3.11 or newer, nothing else.

PYTHON  ?= python3
VENV    ?= .venv
OLDEST   = .venv-oldest
BIN      = $(VENV)/bin
EXTRAS   = lab,images,hf,lightning,report,dev
TORCH   ?= 2.13.0
ARGS    ?=
NAME    ?=
ENGINES  = $(patsubst tests/engines/%/requirements.lock,%,$(wildcard tests/engines/*/requirements.lock))

# One thread a process: the tests run in as many processes as there are cores.
# All tests with several ranks go to one process, which owns the pool of ranks (loadgroup).
XDIST    = -n auto --dist loadgroup
TEST_ENV = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PIP      = $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help engine-names env compare reproduce evidence test test-all test-oldest engine-env test-engines invariance mutations faults \
        check docs house format dist bench bench-grid lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo
	@echo '  ARGS="..." goes to the command, e.g.  make compare ARGS="--quick"   make test ARGS="-k config"'
	@echo '  PYTHON=python3.12 chooses the Python that .venv is made with'

env: $(VENV)/.installed  ## make .venv with the exact packages of requirements.lock

compare: env  ## train the strategies side by side on the text of this machine, write a report
	$(BIN)/equipoise compare $(ARGS)

reproduce: env  ## train what is missing of the claims under evidence/ and judge them; ARGS="E01" for some of them
	$(BIN)/equipoise reproduce $(or $(ARGS),--all)

evidence: env  ## write docs/evidence.md and runs/evidence.html again from the runs on record, in seconds
	$(BIN)/equipoise reproduce --all --from-records --html runs/evidence.html

test: env  ## all tests, the examples in the docstrings among them
	$(TEST_ENV) $(BIN)/python -m pytest $(XDIST) $(ARGS)

test-all: env  ## the same and what takes long, the full matrix among it
	$(TEST_ENV) $(BIN)/python -m pytest $(XDIST) -m "not engine" $(ARGS)

test-oldest: $(OLDEST)/.installed  ## all tests with the oldest packages that pyproject.toml allows, in .venv-oldest
	$(TEST_ENV) $(OLDEST)/bin/python -m pytest $(XDIST) $(ARGS)

# Engines cannot share an environment: each pins another transformers. Its lock lies beside its tests.
engine-env: $(if $(filter $(NAME),$(ENGINES)),.venv-$(NAME)/.installed,engine-names)  ## make .venv-NAME for the tests with one engine: NAME=...

test-engines: $(if $(filter $(NAME),$(ENGINES)),.venv-$(NAME)/.installed,engine-names)  ## tests with a released engine in a real run: NAME=...
	$(TEST_ENV) .venv-$(NAME)/bin/python -m pytest -m engine tests/engines/$(NAME) $(ARGS)

engine-names:
	@echo "make: expected NAME=, one of: $(ENGINES)"; exit 2

# In parts: ARGS='-k "ddp and reentrant"'. Without the Tie every case has to fail: ARGS="--without-tie".
invariance: env  ## every way to cut a batch: the full product of the matrix, many hours
	$(TEST_ENV) $(BIN)/python -m pytest -m full tests/contracts/invariance $(ARGS)

mutations: env  ## plant the mistakes of other engines; the tests must catch each
	$(BIN)/python tests/mutations.py $(ARGS)

faults: env  ## kill training processes at random moments, resume, compare: takes half an hour
	PYTHONPATH=tests $(BIN)/python -m unit.lab.training.faults $(ARGS)

check: env  ## ruff (lint and format) and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv-docs/.installed  ## the documentation as a site, with the reference of every public name: build/site/index.html
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet
	@echo "site: build/site/index.html; with its search: python3 -m http.server -d build/site"

house:  ## draw the rooms of the library, their floors and who imports whom: docs/house.svg
	PYTHONPATH=tests $(PYTHON) -m meta.house

format: env  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: env  ## build the sdist and the wheel in dist/
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

bench: env  ## the MoE layer against its peers, what balancing costs, the trainer, how a step grows, with a page: 12 minutes
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-grid: env  ## the MoE layer at a sample of the grid of sizes, types and threads: 15 minutes, goes on when killed
	$(BIN)/python benchmarks/moe_layer.py --grid $(ARGS)

# The pins are what pip chooses today in an empty environment; a local version (+cpu) is where this machine found a
# package and not part of the pin.
lock:  ## choose all versions again and write requirements.lock
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install "torch==$(TORCH)" ".[$(EXTRAS)]"
	{ echo "# Written by \`make lock\`: what \`make env\` installs."; \
	  build/lock/bin/python -m pip freeze --exclude equipoise | sed 's/+[a-z0-9.]*$$//'; } > build/requirements.lock
	mv build/requirements.lock requirements.lock
	rm -rf build/lock

.venv-docs/.installed: docs/requirements.lock
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	@touch $@

# The locks are whole: nothing is resolved, so that no other torch comes along.
.venv-%/.installed: tests/engines/%/requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement $<
	.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

clean:  ## remove all environments and every cache; runs/ stays
	rm -rf $(VENV) $(OLDEST) .venv-* build dist .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made once, from nothing, and made again when the lock changes.
$(VENV)/.locked: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: expected Python 3.11 or newer as $(PYTHON)"; \
	  echo "  got: $$($(PYTHON) --version 2>&1 | head -n 1)"; \
	  echo "  do:  name another one, e.g. make $(or $(MAKECMDGOALS),env) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet --requirement requirements.lock
	@touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Only the direct dependencies are pinned, to their lower bounds; what these need is the newest that fits them.
$(OLDEST)/.installed: requirements-oldest.txt pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --constraint requirements-oldest.txt --editable ".[$(EXTRAS)]"
	@touch $@
