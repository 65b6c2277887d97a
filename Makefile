# Needs only Python 3.11 (PYTHON=... names another interpreter) and make; everything else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two test processes with one torch thread each are faster than one process with two.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: help install demo test check lint format matrix bench bench-accuracy bench-gpu dist clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install the package in it, editable, with everything for development

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' is not Python 3.11, the only one supported. Install it, or run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' has no venv module. On Debian and Ubuntu: apt-get install python3.11-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## train, prune, verify and compile a ResNet-20 on Fashion-MNIST (about five minutes)
	$(BIN)/chase-fx demo

test: $(STAMP) ## run the tests
	$(PYTEST)

check: lint test ## the whole gate: linters, types, import rules, tests

lint: $(STAMP) ## linters, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

matrix: $(STAMP) ## judge every model of the matrix (long, resumable)
	@# Both parts run whatever the other one finds, and either one fails the target.
	@status=0; $(BIN)/python -m tests.matrix || status=1; $(PYTEST) -m matrix || status=1; exit $$status

bench: $(STAMP) ## run every benchmark under benchmarks/ (long)
	@for script in benchmarks/*.py; do \
	  [ -e "$$script" ] || { echo "no benchmarks yet"; exit 0; }; \
	  echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

bench-accuracy: $(STAMP) ## compare accuracies at equal cost on Fashion-MNIST (long, resumable)
	$(BIN)/python -m benchmarks.accuracy --workers $(WORKERS)

bench-gpu: $(STAMP) ## latency of dense and slim models, and the cost of masks, on a GPU (about six minutes)
	$(BIN)/python benchmarks/gpu_latency.py
	$(BIN)/python benchmarks/training_cost.py --device cuda --output benchmarks/training_cost_gpu.json

dist: $(STAMP) ## build the sdist and the wheel
	$(BIN)/python -m build

clean: ## remove .venv and everything that the other targets made
	rm -rf $(VENV) dist build demo-output .coverage htmlcov .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
