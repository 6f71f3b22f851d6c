# Every target sets up what it needs: a virtual environment, torch first, then the package with its extras.
#   make demo | test | lint | kernels | upstream-tests | matrix | clean | help
#   TRANSFORMERS=5.17.0   use another version of transformers, in an environment of its own
#   TORCH_INDEX=URL       where to get torch, such as https://download.pytorch.org/whl/cpu for the small CPU build
#   SHORT=1               make demo: the short form that continuous integration runs
#   ALL=1                 make demo: goes on to the other objectives, sparse decoding, and summaries
#   PYTEST_ARGS="..."     make test: further arguments, such as "-m slow" or "-k tupe"
#   MATRIX_ARGS="..."     make matrix: a part of it, such as "--consumers peft,TRL --families tupe"

TRANSFORMERS ?=
TORCH_INDEX ?=
SHORT ?=
ALL ?=
PYTEST_ARGS ?=
MATRIX_ARGS ?=

# The first Python of a version that the package supports; a shim that does not run does not count.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
  $$python -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' >/dev/null 2>&1 \
  && echo $$python && break; done)

VENV := .venv$(if $(TRANSFORMERS),-transformers-$(TRANSFORMERS))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILD_KERNELS := $(BIN)/python kernels/build.py
QUIETLY := --quiet --disable-pip-version-check --no-warn-script-location
SOURCES := hf_efficient training tests model_cards kernels

# What the matrix runs besides what the tests need. The torch that was installed first stays: constraints.txt names it.
MATRIX_VENV := .venv-matrix
MATRIX_PACKAGES := sentence-transformers trl peft torchao lm-eval onnx onnxruntime onnxscript

.PHONY: help demo test lint kernels upstream-tests matrix install clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@sed -n 's/^#   \([A-Z_]*=.*\)/  \1/p' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Set up the environment (the other targets do it by themselves)

# The stamp comes last, so that an interrupted installation is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; give it as: make PYTHON=/path/to/python"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@sed '$(if $(TRANSFORMERS),s/^transformers==.*/transformers==$(TRANSFORMERS)/,)' constraints.txt > $(VENV)/constraints.txt
	@echo "Installing torch, then the rest, into $(VENV); this takes a few minutes the first time."
	@$(BIN)/python -m pip install $(QUIETLY) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	@$(BIN)/python -m pip install $(QUIETLY) --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

kernels: $(INSTALLED) ## Build all compiled kernels that can be built here (demo and test build those that can run here)
	$(BUILD_KERNELS)

demo: $(INSTALLED) ## Pretrain a small TUPE, fine-tune it, score it, use it in pipelines; let a small SRU++ write
	@$(BUILD_KERNELS) --runnable || echo "The demo goes on in plain torch."
	@$(BIN)/python -m training.quickstart $(if $(SHORT),--short) $(if $(ALL),--all)

# Exit code 3 says that something is lacking, such as a compiler. One that fails is a fault, and the tests do not hide it.
# A file's tests run in one process, which makes their fixtures once.
test: $(INSTALLED) ## Run the tests
	@$(BUILD_KERNELS) --runnable || { test $$? -eq 3 && echo "The tests go on in plain torch."; }
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

lint: $(INSTALLED) ## Format (in continuous integration: check the format), lint and check types
	$(BIN)/ruff format $(if $(CI),--check) $(SOURCES)
	$(BIN)/ruff check $(if $(CI),,--fix) $(SOURCES)
	$(BIN)/mypy

upstream-tests: $(INSTALLED) ## Run transformers' own common tests, fetched from its source distribution
	$(BIN)/python -m tests.upstream.run

# An environment of its own, made anew in the way of the first one; `.venv` is not touched.
matrix: ## Run each model family with each library that models are given to, and write docs/compatibility.md
	$(MAKE) install VENV=$(MATRIX_VENV)
	$(MATRIX_VENV)/bin/python -m pip install --quiet --constraint $(MATRIX_VENV)/constraints.txt $(MATRIX_PACKAGES)
	HF_HUB_OFFLINE=1 $(MATRIX_VENV)/bin/python -m training.compatibility $(MATRIX_ARGS)

clean: ## Remove environments, caches, built kernels and what the demo wrote
	rm -rf .venv .venv-transformers-* .venv-matrix .upstream runs/quickstart* build kernels/*/build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
