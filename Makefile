# `make help` lists the targets. Variables that may be set:
#   PYTHON     interpreter to make the environment with (3.11 or newer)
#   DALI       cuda130 (CUDA 13, or no GPU) or cuda120
#   PIP_FLAGS  further flags of pip install
#   WORKERS    processes that run the tests side by side
PYTHON ?= python3
VENV ?= .venv
DALI ?= cuda130
PIP_FLAGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
RUN := runs/quickstart

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-long test-gpu docs lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.installed ## make .venv with everything in it

$(VENV)/.installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; give another: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) lacks venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing tetdist and what it needs into $(VENV) (minutes, the first time)"
	@# PyPI's torch is for CUDA 13.
	@test '$(DALI)' != cuda120 || $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) \
	  'torch<2.15' torchvision --index-url https://download.pytorch.org/whl/cu126
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) \
	  -e '.[train,$(DALI),quickstart,events,export,test,lint]'
	@touch $@

# What only tests need on a machine without a GPU: Triton. With torch for CUDA it is there.
$(VENV)/.tests: $(VENV)/.installed
	@$(BIN)/python -c 'import triton' 2>/dev/null || { \
	  echo "installing Triton for the tests into $(VENV) (1 GB)"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	    -e '.[gpu-code]'; }
	@touch $@

quickstart: venv ## real data, a trained and evaluated spiking network, in minutes
	@$(BIN)/python tools/digits.py data/digits
	@$(BIN)/deepspeed --num_gpus 1 --log_level warning tetdist/train.py --config quickstart.yaml
	@$(BIN)/python tools/eval.py --checkpoint $(RUN) --json $(RUN)/evaluation.json
	@echo
	@echo "The run is in $(RUN), its curves are in $(RUN)/plots/learning_curves.png. To watch it:"
	@echo "  $(BIN)/mlflow ui --workers 1 --backend-store-uri 'sqlite:///$(CURDIR)/runs/mlflow.db'"

test: $(VENV)/.tests ## run the tests (minutes)
	@$(BIN)/python -m pytest -m "not long" -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  --nbmake tests docs/first_look.ipynb $(PYTEST_FLAGS)

test-long: $(VENV)/.tests ## run the tests that take longer
	@$(BIN)/python -m pytest -m long -n $(WORKERS) $(PYTEST_FLAGS)

test-gpu: venv ## run the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS)

$(VENV)/.docs: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs ## build the site of docs/ in site/; a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: venv ## ruff, the type checker, and which room may know which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: venv ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove caches (neither .venv nor data nor runs)
	@rm -rf build dist site .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
