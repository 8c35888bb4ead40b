# make quickstart and make test are each enough by themselves: both set up .venv first, and skip what is there.

PYTHON ?= python3.11
# Index URL of PyTorch's CPU wheels; empty: torch comes from wherever pip is configured to look.
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := requirements/cpu.txt
TORCH := $(shell grep '^torch==' $(REQUIREMENTS))
# Changes with the pins and with the package's metadata, so that either one brings a new set-up.
SETUP_KEY := $(shell cat $(REQUIREMENTS) setup.cfg pyproject.toml | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/setup-$(SETUP_KEY).done

NEMO_RUN := .venv-nemo-run
NEMO_RUN_EXTRA := $(shell sed -n '/^nemo-run =$$/,/^[^ ]/s/^    //p' setup.cfg)
NEMO_RUN_STAMP := $(NEMO_RUN)/setup-$(shell echo "$(NEMO_RUN_EXTRA)" | cksum | cut -d ' ' -f 1).done

DOCS := .venv-docs
DOCS_REQUIREMENTS := requirements/docs.txt
DOCS_STAMP := $(DOCS)/setup-$(shell cksum < $(DOCS_REQUIREMENTS) | cut -d ' ' -f 1).done

.DEFAULT_GOAL := help
.PHONY: help setup setup-nemo-run setup-docs quickstart test test-all lint format docs pictures clean

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

setup: $(STAMP)  ## Create .venv from the pinned requirements and install the package into it.

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "error: PYTHON=$(PYTHON) must be Python 3.11, which the pins in $(REQUIREMENTS) are for" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) install --quiet --no-deps --index-url $(TORCH_INDEX) $(TORCH))
	$(PIP) install --quiet --no-deps -r $(REQUIREMENTS)
	@# A CUDA build of torch does not import without the libraries that --no-deps left out.
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@# An environment of an older set-up has a torchvision that its torch cannot load.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision 2>/dev/null
	$(BIN)/python -W ignore -c 'from transformers import Qwen2ForCausalLM; import megatron.core, sglang, megatron_dypo'
	@rm -f $(VENV)/setup-*.done && touch $@

setup-nemo-run: $(NEMO_RUN_STAMP)  ## Create .venv-nemo-run, from which examples/nemo_run is started (540 MB).

$(NEMO_RUN_STAMP):
	$(PYTHON) -m venv $(NEMO_RUN)
	$(NEMO_RUN)/bin/python -m pip --disable-pip-version-check install --quiet $(patsubst %,'%',$(NEMO_RUN_EXTRA))
	@# The package alone: neither torch nor anything that trains is needed where jobs are started from.
	$(NEMO_RUN)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -e .
	@rm -f $(NEMO_RUN)/setup-*.done && touch $@

setup-docs: $(DOCS_STAMP)  ## Create .venv-docs, which builds the site of docs/ (170 MB).

$(DOCS_STAMP): $(DOCS_REQUIREMENTS)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r $(DOCS_REQUIREMENTS)
	@rm -f $(DOCS)/setup-*.done && touch $@

quickstart: setup  ## Train a tiny model with DYPO from start to end.
	$(BIN)/python examples/quickstart/run.py

test: setup  ## Run the tests that need no GPU and are not marked slow.
	@$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: setup  ## Run every test that needs no GPU.
	@$(BIN)/python -m pytest -m "not gpu"

lint: setup  ## Check style, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## Format the code and apply the safe fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup-docs  ## Build the site of docs/ into site/; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

pictures: setup  ## Draw docs/pictures/*.svg from their sources.
	$(BIN)/python -m tools.pictures

clean:  ## Remove caches; environment and runs stay.
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
