# `make help` lists the targets. Variables that may be set:
#   PYTHON     interpreter to make the environment with (3.11 or newer)
#   DALI       cuda130 (CUDA 13), cuda120 or cpu (no GPU); an environment keeps its own
#   PIP_FLAGS  further flags of pip install
#   WORKERS    number of parallel test processes
PYTHON ?= python3
VENV ?= .venv
# DALI of an environment that exists.
MADE := $(shell cat $(VENV)/.installed 2>/dev/null)
DALI ?= $(or $(MADE),cuda130)
PIP_FLAGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
TORCH = https://download.pytorch.org/whl/$(if $(filter cpu,$(DALI)),cpu,cu126)
RUN := runs/quickstart

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-quick test-long test-slurm test-triton test-lowest test-gpu compare docs lint constraints format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.installed ## make .venv with what training needs

# The other checkout whose tetdist the environment has: `pip install -e` would replace it by this one.
OTHER := $(filter-out $(CURDIR),$(shell sed -n 's|.*"url": "file://\([^"]*\)".*|\1|p' \
  $(VENV)/lib/python3*/site-packages/tetdist-*.dist-info/direct_url.json 2>/dev/null))
ifneq ($(wildcard $(addsuffix /setup.py,$(OTHER))),)
$(info $(VENV) has the tetdist of $(OTHER), so nothing is installed into it)
$(info To use it without make: export PYTHONPATH=$(CURDIR))
export PYTHONPATH := $(CURDIR)
$(VENV)/.installed $(VENV)/.tests $(VENV)/.lint $(VENV)/.docs: ;
else
ifneq ($(filter-out $(DALI),$(MADE)),)
$(error $(VENV) is for DALI=$(MADE); for another one, remove it first: rm -r $(VENV))
endif
$(VENV)/.installed: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; use another: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) lacks venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@case '$(DALI)' in cuda130|cuda120|cpu) ;; \
	  *) echo "error: DALI=$(DALI) is unknown; use cuda130, cuda120 or cpu" >&2; exit 2;; esac
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing tetdist and its dependencies into $(VENV) (takes minutes the first time)"
	@# PyPI's torch is for CUDA 13. A machine that reaches only a mirror of PyPI finds no other builds, and would
	@# wait for them with every package; so pip first tries a small one.
	@test '$(DALI)' = cuda130 || { \
	  probe=$$(mktemp -d) && trap 'rm -rf "$$probe"' EXIT; \
	  if $(BIN)/python -m pip download -q --disable-pip-version-check --retries 1 --timeout 10 --no-deps \
	    --dest "$$probe" filelock --index-url $(TORCH) >/dev/null 2>&1; then \
	    $(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) \
	      'torch<2.15' torchvision --index-url $(TORCH); \
	  elif test '$(DALI)' = cpu; then \
	    echo "pip cannot reach $(TORCH), so it installs the torch of its own index (maybe for CUDA)"; \
	  else \
	    echo "error: pip cannot reach $(TORCH), where torch for CUDA 12 is; set pip's proxy," \
	      "or install torch for CUDA 12 into $(VENV) and use pip (docs/install.md)" >&2; exit 2; \
	  fi; }
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) \
	  $(if $(wildcard $@),--quiet) -e '.[train,$(DALI:cpu=cuda130),quickstart]'
	@echo $(DALI) > $@

# Tests need Triton also on a machine without a GPU; torch for CUDA includes it.
$(VENV)/.tests: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	  -e '.[events,export,test]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || { \
	  echo "installing Triton for the tests into $(VENV) (1 GB)"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
	    -e '.[gpu-code]'; }
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -e '.[docs]'
	@touch $@
endif

quickstart: venv ## train and evaluate a spiking network on digits: two minutes on two cores
	@$(BIN)/python tools/digits.py data/digits
	@$(BIN)/python tetdist/train.py --config quickstart.yaml
	@$(BIN)/python tools/eval.py $(RUN) --json $(RUN)/evaluation.json
	@echo
	@echo "The run is in $(RUN), its curves are in $(RUN)/plots/learning_curves.png. To watch it:"
	@echo "  $(abspath $(BIN))/mlflow ui --workers 1 --backend-store-uri 'sqlite:///$(CURDIR)/runs/mlflow.db'"
	@set -- $$(cat $(RUN)/mlflow_run_id); \
	  echo "  # then open http://localhost:5000/#/experiments/$$2/runs/$$1/model-metrics?workflowType=machine_learning"

# The definitions of neurons and losses, a tiny run, and one that is continued.
QUICK := nn/test_neurons.py nn/test_kinds.py nn/test_fused.py test_losses.py \
  test_imports.py::test_names_are_those_that_are_registered \
  training/test_train.py::test_finished_run_says_so_and_changes_nothing \
  training/test_train.py::test_max_steps_ends_evaluated_and_can_be_raised

test-quick: lint $(VENV)/.tests ## run lint and the tests that see most in 90 seconds
	@$(BIN)/python -m pytest -q -m "not long" $(addprefix tests/,$(QUICK)) $(PYTEST_FLAGS)

test: $(VENV)/.tests ## run the tests (minutes)
	@$(BIN)/python -m pytest -m "not long" -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  --nbmake tests docs/first_look.ipynb $(PYTEST_FLAGS)

test-long: $(VENV)/.tests ## run the tests that take longer
	@$(BIN)/python -m pytest -m long -n $(WORKERS) $(PYTEST_FLAGS)

test-slurm: $(VENV)/.tests ## run the longer tests on a Slurm cluster, which they start
	@$(BIN)/python -m pytest -m long -n $(WORKERS) tests/slurm $(PYTEST_FLAGS)

# Those of torch 2.7 to 2.13, and the newest.
TRITONS ?= 3.3.1 3.4.0 3.5.1 3.6.0 3.7.1 3.9.0
test-triton: $(VENV)/.tests ## compile the GPU's kernels with several versions of Triton (4 GB)
	@for version in $(TRITONS); do \
	  folder=$(VENV)/triton/$$version; \
	  [ -d $$folder ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-deps --target $$folder triton==$$version || exit 1; \
	  PYTHONPATH=$$folder $(BIN)/python tests/compile_kernels.py 2>$$folder.log || \
	    { echo "error: what Triton $$version says is in $$folder.log" >&2; exit 1; }; \
	done

# All other packages, such as SQLAlchemy, are the newest that go with them.
LOWEST := $(abspath $(VENV))/lowest
test-lowest: ## train the quickstart with the lowest versions that pyproject.toml allows (8 GB)
	@test -x $(LOWEST)/bin/uv || { $(PYTHON) -m venv $(LOWEST) && $(LOWEST)/bin/pip install --quiet uv; }
	@$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct \
	  -r pyproject.toml --extra train --extra cuda130 --extra quickstart
	@folder=$$(mktemp -d) && trap 'rm -r "$$folder"' EXIT && cd "$$folder" && \
	  export PYTHONPATH=$(CURDIR) && $(LOWEST)/bin/python -m tetdist quickstart 2>&1 | tee log && \
	  $(LOWEST)/bin/python -m tetdist show runs/quickstart && ! grep '^tracker .* lacks' log

test-gpu: $(VENV)/.tests ## run the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu $(PYTEST_FLAGS)

FORTY := device=cpu max_steps=40 log_every=1 plots=false tracking.mlflow=false data.root=$(CURDIR)/data/digits
compare: venv ## compare the quickstart's first losses and weights with a commit's: make compare BASE=COMMIT
	@git rev-parse --quiet --verify '$(BASE)^{commit}' >/dev/null || \
	  { echo "error: BASE=$(BASE) is not a commit; give one: make compare BASE=HEAD" >&2; exit 2; }
	@$(BIN)/python tools/digits.py data/digits
	@folder=$$(mktemp -d) && trap "git worktree remove --force $$folder/base; rm -r $$folder" EXIT && \
	  git worktree add --quiet --detach $$folder/base $(BASE) && \
	  for tree in $$folder/base $(CURDIR); do \
	    echo "training 40 steps with $$tree" && cd $$tree && PYTHONPATH=$$tree $(abspath $(BIN))/python \
	      tetdist/train.py --config quickstart.yaml $(FORTY) runs_dir=$$folder name=$$(basename $$tree)_run \
	      >$$folder/log 2>&1 || { cat $$folder/log >&2; exit 2; }; done && \
	  $(abspath $(BIN))/python tools/compare_runs.py $$folder/base_run $$folder/$(notdir $(CURDIR))_run

docs: $(VENV)/.docs ## build the site of docs/ in site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "To read it at http://localhost:8000: python3 -m http.server 8000 --bind 127.0.0.1 -d site"

lint: $(VENV)/.lint ## run ruff, the type checker and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

constraints: venv ## renew constraints.txt with the newest versions that pyproject.toml allows
	@$(BIN)/python docs/make/constraints.py

format: $(VENV)/.lint ## reformat and fix the code with ruff
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove caches (keeps .venv, data and runs)
	@rm -rf build dist site .cache *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
