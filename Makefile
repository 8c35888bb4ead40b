# make quickstart and make test are each enough by themselves: both set up .venv first, and skip what is there.

PYTHON ?= python3.11
# Index URL of PyTorch's CPU wheels; empty: torch comes from wherever pip is configured to look.
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests that run at a time in `make test`; each may start servers and ranks of its own (up to 6 GiB).
TEST_WORKERS ?= 2
REQUIREMENTS := requirements/cpu.txt
# Packages whose files tests read; they go beside the environment's own packages, where nothing imports them.
TEST_DATA_REQUIREMENTS := requirements/test_data.txt
TEST_DATA := $(VENV)/test_data
TEST_DATA_STAMP := $(TEST_DATA)/setup-$(shell cksum $(TEST_DATA_REQUIREMENTS) | cut -d ' ' -f 1).done
TORCH_REQUIREMENTS := requirements/torch.txt
TORCH := $(shell grep '^torch==' $(TORCH_REQUIREMENTS))
# Changes with the pins and with the package's metadata, so that either one brings a new set-up.
SETUP_KEY := $(shell cat $(TORCH_REQUIREMENTS) $(REQUIREMENTS) setup.cfg pyproject.toml | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/setup-$(SETUP_KEY).done

NEMO_RUN := .venv-nemo-run
NEMO_RUN_EXTRA := $(shell sed -n '/^nemo-run =$$/,/^[^ ]/s/^    //p' setup.cfg)
NEMO_RUN_STAMP := $(NEMO_RUN)/setup-$(shell echo "$(NEMO_RUN_EXTRA)" | cksum | cut -d ' ' -f 1).done

# Its source archive has vocabularies of published models, with the ids that their tokenizers give.
LLAMA_CPP_PIN := llama-cpp-python==0.3.36
LLAMA_CPP := .venv-llama-cpp
LLAMA_CPP_STAMP := $(LLAMA_CPP)/$(LLAMA_CPP_PIN).done

# Python of Transformer Engine, in the lowest and the highest supported version. Tests import it over a stand-in for its compiled parts.
TE_LOWEST_REQUIREMENTS := requirements/te_lowest.txt
TE_HIGHEST_REQUIREMENTS := requirements/te_highest.txt
TE := .venv-te
TE_STAMP := $(TE)/setup-$(shell cat $(TE_LOWEST_REQUIREMENTS) $(TE_HIGHEST_REQUIREMENTS) | cksum | cut -d ' ' -f 1).done

# A pretrained model, and the two packages with which transformers reads its file; for examples/smollm2_135m alone.
SMOLLM2_REQUIREMENTS := requirements/smollm2.txt
SMOLLM2 := .venv-smollm2
SMOLLM2_STAMP := $(SMOLLM2)/setup-$(shell cksum < $(SMOLLM2_REQUIREMENTS) | cut -d ' ' -f 1).done

# The harness that benchmarks/lm_eval_gsm8k.py compares `megatron-dypo eval` with.
LM_EVAL := .venv-lm-eval
LM_EVAL_REQUIREMENTS := requirements/lm_eval.txt
LM_EVAL_STAMP := $(LM_EVAL)/setup-$(shell cksum < $(LM_EVAL_REQUIREMENTS) | cut -d ' ' -f 1).done

# Another core than the pinned one, unpacked beside the packages of .venv.
CORE_REQUIREMENTS := requirements/core.txt
CORE := .venv-core
CORE_STAMP := $(CORE)/setup-$(shell cksum < $(CORE_REQUIREMENTS) | cut -d ' ' -f 1).done
CORE_TESTS := $(addprefix tests/unit/mcore/test_,compat.py features.py common_state.py) \
	$(addprefix tests/dist/test_,training.py moe.py checkpoint.py)

# Megatron-Bridge, for models without a name table: `make test-megatron-bridge` finds it beside the packages of .venv.
BRIDGE_REQUIREMENTS := requirements/megatron_bridge.txt
BRIDGE := .venv-megatron-bridge
BRIDGE_STAMP := $(BRIDGE)/setup-$(shell cksum < $(BRIDGE_REQUIREMENTS) | cut -d ' ' -f 1).done
BRIDGE_TESTS := $(addprefix tests/,dist/test_bridged_models.py dist/test_bridged_training.py unit/check/test_bridged_checks.py \
	unit/mcore/test_bridged_package.py unit/te/test_bridged_layers.py)

# For `make test-versions`: pairs such as 3.12/0.19.2 (empty: all), and interpreters that are not on the path.
VERSIONS ?=
PYTHONS ?=

DOCS := .venv-docs
DOCS_REQUIREMENTS := requirements/docs.txt
DOCS_STAMP := $(DOCS)/setup-$(shell cksum < $(DOCS_REQUIREMENTS) | cut -d ' ' -f 1).done

.DEFAULT_GOAL := help
.PHONY: help setup setup-nemo-run setup-test-data setup-llama-cpp setup-te setup-smollm2 setup-lm-eval setup-core \
	setup-megatron-bridge setup-docs \
	quickstart smollm2 tiny-study tiny-study-smollm2 test test-all test-core test-megatron-bridge \
	test-versions lint format docs pictures clean

help:  ## Show the targets.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 18

setup: $(STAMP)  ## Create .venv from the pinned requirements and install the package into it.

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "error: PYTHON=$(PYTHON) must be Python 3.11, which the pins in $(REQUIREMENTS) are for" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet --no-deps --require-hashes -r $(REQUIREMENTS)
	@# A CUDA build of torch does not import without the libraries that --no-deps left out.
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@# An environment of an older set-up has a torchvision that its torch cannot load.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision 2>/dev/null
	$(BIN)/python -W ignore -c 'from transformers import Qwen2ForCausalLM; import megatron.core, sglang, megatron_dypo'
	@rm -f $(VENV)/setup-*.done && touch $@

setup-test-data: $(TEST_DATA_STAMP)  ## Fetch the published tokenizers and templates that tests read (19 MB).

$(TEST_DATA_STAMP): | $(STAMP)
	@rm -rf $(TEST_DATA)
	@$(PIP) install --quiet --no-deps --require-hashes --no-compile --target $(TEST_DATA) -r $(TEST_DATA_REQUIREMENTS) && touch $@ \
		|| echo "warning: published tokenizers cannot be fetched: their tests will be skipped" >&2

setup-nemo-run: $(NEMO_RUN_STAMP)  ## Create .venv-nemo-run, from which examples/nemo_run is started (540 MB).

$(NEMO_RUN_STAMP):
	$(PYTHON) -m venv $(NEMO_RUN)
	$(NEMO_RUN)/bin/python -m pip --disable-pip-version-check install --quiet $(patsubst %,'%',$(NEMO_RUN_EXTRA))
	@# The package alone: neither torch nor anything that trains is needed where jobs are started from.
	$(NEMO_RUN)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -e .
	@rm -f $(NEMO_RUN)/setup-*.done && touch $@

setup-llama-cpp: $(LLAMA_CPP_STAMP)  ## Fetch the vocabularies of llama.cpp, for tests (77 MB, of which 15 MB are kept).

$(LLAMA_CPP_STAMP): | $(STAMP)
	@rm -rf $(LLAMA_CPP) && mkdir $(LLAMA_CPP)
	$(PIP) download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA_CPP) $(LLAMA_CPP_PIN)
	@tar -xzf $(LLAMA_CPP)/*.tar.gz -C $(LLAMA_CPP) --strip-components=4 --wildcards \
		'*/models/ggml-vocab-llama-*' '*/models/ggml-vocab-qwen2.*'
	@rm $(LLAMA_CPP)/*.tar.gz && touch $@

setup-te: $(TE_STAMP)  ## Fetch the Python of Transformer Engine, for tests (2 MB).

$(TE_STAMP): | $(STAMP)
	@rm -rf $(TE) && mkdir $(TE)
	@$(PIP) install --quiet --no-deps --require-hashes --no-compile --target $(TE)/lowest -r $(TE_LOWEST_REQUIREMENTS) \
		&& $(PIP) install --quiet --no-deps --require-hashes --no-compile --target $(TE)/highest -r $(TE_HIGHEST_REQUIREMENTS) \
		&& touch $@ || echo "warning: Transformer Engine cannot be fetched: tests over its Python will be skipped" >&2

setup-smollm2: $(SMOLLM2_STAMP)  ## Fetch SmolLM2-135M-Instruct, for its example and its tests (97 MB).

$(SMOLLM2_STAMP): | $(STAMP)
	@rm -rf $(SMOLLM2)
	$(PIP) install --quiet --no-deps --require-hashes --no-compile --target $(SMOLLM2) -r $(SMOLLM2_REQUIREMENTS)
	@touch $@

setup-lm-eval: $(LM_EVAL_STAMP)  ## Create .venv-lm-eval with lm-evaluation-harness, for its benchmark (770 MB).

$(LM_EVAL_STAMP): $(LM_EVAL_REQUIREMENTS)
	$(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes -r $(LM_EVAL_REQUIREMENTS)
	@rm -f $(LM_EVAL)/setup-*.done && touch $@

setup-core: $(CORE_STAMP)  ## Fetch the newest Megatron-Core, for test-core (9 MB).

$(CORE_STAMP): $(CORE_REQUIREMENTS) | $(STAMP)
	@rm -rf $(CORE)
	@# Its wheels are for Python 3.12 and 3.13. The Python code in them runs on 3.11 too.
	$(PIP) install --quiet --python-version 3.12 --ignore-requires-python --only-binary=:all: --no-compile --target $(CORE) \
		--no-deps --require-hashes -r $(CORE_REQUIREMENTS)
	@touch $@

setup-megatron-bridge: $(BRIDGE_STAMP)  ## Fetch Megatron-Bridge, for test-megatron-bridge (2 MB).

$(BRIDGE_STAMP): $(BRIDGE_REQUIREMENTS) | $(STAMP)
	@rm -rf $(BRIDGE)
	$(PIP) install --quiet --no-deps --require-hashes --no-compile --target $(BRIDGE) -r $(BRIDGE_REQUIREMENTS)
	@touch $@

setup-docs: $(DOCS_STAMP)  ## Create .venv-docs, which builds the site of docs/ (170 MB).

$(DOCS_STAMP): $(DOCS_REQUIREMENTS)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes -r $(DOCS_REQUIREMENTS)
	@rm -f $(DOCS)/setup-*.done && touch $@

quickstart: setup  ## Train a tiny model with DYPO from start to end.
	$(BIN)/python examples/quickstart/run.py

smollm2: setup setup-smollm2  ## Train a pretrained model of 135 million parameters with DYPO, on two CPU cores.
	$(BIN)/python examples/smollm2_135m/run.py

tiny-study: setup  ## Compare every objective on two tiny tasks, tuned alike, with five seeds (hours).
	$(BIN)/python examples/tiny_study/run.py

tiny-study-smollm2: setup setup-smollm2  ## Compare DYPO, GRPO, SFT and SFT then RL on a pretrained model (hours).
	$(BIN)/python examples/tiny_study/run.py examples/tiny_study/smollm2.yaml

test: setup setup-test-data setup-te  ## Run the tests that need no GPU and are not marked slow.
	@# By file: the tests of one share servers and runs. Not by their number in a file: tests/conftest.py has put long ones first.
	@$(BIN)/python -m pytest -m "not slow and not gpu" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=10

test-all: setup setup-test-data setup-te  ## Run every test that needs no GPU.
	@$(BIN)/python -m pytest -m "not gpu"

test-core: setup setup-core  ## Run some tests on the newest Megatron-Core instead of the pinned one, as CI does.
	PYTHONPATH=$(CURDIR)/$(CORE) $(BIN)/python -c 'from importlib.metadata import version as v; print("megatron-core", v("megatron-core"))'
	@PYTHONPATH=$(CURDIR)/$(CORE) $(BIN)/python -m pytest -q -m "not slow and not gpu" $(CORE_TESTS) -n $(TEST_WORKERS) --dist loadfile

test-megatron-bridge: setup setup-megatron-bridge  ## Run the tests of models that Megatron-Bridge names.
	@PYTHONPATH=$(CURDIR)/$(BRIDGE) $(BIN)/python -m pytest -q -m "not slow and not gpu" $(BRIDGE_TESTS) -n $(TEST_WORKERS) --dist loadfile

test-versions: setup  ## Build environments of all supported Pythons and cores, and test them (hours; VERSIONS=, PYTHONS=).
	@$(BIN)/python tools/versions.py $(VERSIONS) $(addprefix --python ,$(PYTHONS))

lint: setup  ## Check style, formatting, types, the direction of imports, the words and the pins.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/check_words.py
	$(BIN)/python tools/audit.py

format: setup  ## Format the code and apply the safe fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup-docs  ## Build the site of docs/ into site/; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

pictures: setup  ## Draw docs/pictures/*.svg from their sources.
	$(BIN)/python -m tools.pictures

clean:  ## Remove caches; environment and runs stay.
	rm -rf build dist site .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
