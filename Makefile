# The front door. What the targets do is in scripts/epd (Python, standard library only) and in tests/.
# Anything set on the command line reaches it: `make up EPD_PROXY_PORT=9000`, `make logs SERVICE=proxy`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
SERVICE ?=
VLLM ?=
ARGS ?=
PYTEST_ARGS ?=

EPD := PYTHONPATH=scripts PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m epd
BIN := .venv/bin
# Many of the tests wait more than they work.
SIDE_BY_SIDE := --numprocesses=auto --maxprocesses=4
SOURCES := PYTHONPATH=proxy/src:connector/src

.PHONY: $(shell sed -n 's/^\([a-z0-9-]*\):.*\#\#.*/\1/p' Makefile)

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Settings: MODEL=<folder or hub id>, EPD_PROXY_PORT=8000, EPD_NO_INSTALL=1, … (docs/configuration.md)"

up: ## install what is missing, build the images, start the stack, wait until it answers
	@$(EPD) up

down: ## stop the stack (images and volumes stay)
	@$(EPD) down

logs: ## follow the logs (SERVICE=proxy for one service)
	@$(EPD) logs $(SERVICE)

status: ## show each service and whether the proxy is ready
	@$(EPD) status

clean: ## remove containers, volumes, images and the part of .env that `make up` wrote
	@$(EPD) clean

build: ## build the images of this machine's hardware profile (EPD_HARDWARE=a2 for another)
	@$(EPD) build $(ARGS)

pull: ## start the stack from prebuilt images, by the digests in images.lock (REGISTRY=registry.example/team/)
	@EPD_PULL=1 $(EPD) up

push: ## build the images, push them, write their digests to images.lock (REGISTRY=registry.example/team/)
	@$(EPD) push $(ARGS)

publish: ## build for every architecture, with SBOM and provenance, straight into a registry (what releases do)
	@$(EPD) publish $(ARGS)

bundle: ## write a folder for a host without a network (MODEL=<folder> adds the model, BUNDLE=<folder> names it)
	@$(EPD) bundle

load: ## take the images of such a folder (run it in there, or BUNDLE=<folder>)
	@$(EPD) load

deploy-1e1pd: ## start one encoder and one prefill/decode instance
	@TOPOLOGY=1e1pd $(EPD) up

deploy-1e1p1d: ## start one encoder, one prefill and one decode instance
	@TOPOLOGY=1e1p1d $(EPD) up

deploy: ## start another topology (TOPOLOGY=2e4p4d)
	@$(EPD) up

doctor: ## check this machine for the stack that would start; changes nothing (ARGS=--json)
	@$(EPD) doctor $(ARGS)

plan: ## show and write which instance gets which cards and ports (TOPOLOGY=2e4p4d EPD_HOSTS=hosts.json)
	@$(EPD) plan

fetch-model: ## fetch a model from a hub; goes on where it broke off (MODEL_RECIPE=qwen3-vl-8b, or MODEL=<owner>/<name>; HUB=modelscope)
	@$(EPD) fetch-model

kubernetes: ## write the stack as Kubernetes objects (TOPOLOGY=2e4p4d EPD_HARDWARE=a2 MODEL=…)
	@$(EPD) kubernetes

describe: ## print this machine as an inventory, the input of plan
	@$(EPD) describe

test: lint unit test-proxy test-connector check-ascend-image smoke ## everything: lint, unit tests, tests in and of the images, live tests

lint: venv ## ruff, mypy, import-linter, shellcheck, hadolint, checks of the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(SOURCES) $(BIN)/mypy -p epd -p epd_proxy -p epd_connector -p epd_serve
	$(BIN)/vermin --quiet --no-tips --target=3.9- --violations --exclude file scripts/epd
	$(SOURCES) $(BIN)/lint-imports --config proxy/pyproject.toml
	$(SOURCES) $(BIN)/lint-imports --config connector/pyproject.toml
	$(BIN)/shellcheck --exclude=SC1091 .ci/run scripts/*.sh docker/*/*.sh docker/cpu/compat/*/*.sh tests/bench/*.sh tests/images/stand_in/*.sh
	$(BIN)/hadolint --config docker/hadolint.yaml docker/*/Dockerfile tests/images/stand_in/Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/actionlint -shellcheck $(BIN)/shellcheck .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows

unit: venv ## unit tests that need neither vLLM nor a running stack
	$(SOURCES) $(BIN)/pytest $(SIDE_BY_SIDE) tests/scripts tests/docker tests/compose tests/proxy $(PYTEST_ARGS)

test-proxy: ## the proxy's tests again, inside the image that serves, where it is compiled
	@$(EPD) test-proxy $(SIDE_BY_SIDE) $(PYTEST_ARGS)

test-connector: ## connector tests, inside the image that serves
	@$(EPD) test-connector $(PYTEST_ARGS)

test-compat: venv ## contract tests and live tests of 1E1PD with another vLLM, on the CPU (VLLM=0.18.0)
	@$(EPD) test-compat $(VLLM) $(PYTEST_ARGS)

test-faults: venv ## live tests of the embeddings' store: kill, hang, fill and corrupt it, and wait for it; writes docs/ec-faults.md
	@$(EPD) test-faults $(PYTEST_ARGS)

check-ascend-image: venv ## build the Ascend image on a stand-in for CANN's: all that runs without CANN
	@$(EPD) check-ascend-image $(PYTEST_ARGS)

smoke: venv ## live tests: real containers, real requests
	@$(EPD) smoke $(PYTEST_ARGS)

bench-proxy: venv ## compare the proxy with vllm-router on this machine and write docs/performance.md (BENCH=path of proxy_bench.py)
	@$(EPD) bench-proxy $(if $(BENCH),--bench $(BENCH)) $(ARGS)

bench-ec: venv ## hand embeddings over by vLLM's example connector and by ours; writes docs/ec-performance.md
	@$(EPD) bench-ec $(ARGS)

bench-turns: venv ## ask about one picture again, of the split stack and of one vLLM; writes docs/ec-performance.md
	@$(EPD) bench-turns $(ARGS)

docs: venv ## write docs/proxy-settings.md anew, from what the proxy says of itself
	$(BIN)/python scripts/proxy_settings.py

soak-proxy: venv ## many requests, some given up, some to failing instances, and many streams at once (ARGS="--requests 100000")
	PYTHONPATH=proxy/src $(BIN)/python tests/bench/soak.py $(ARGS)

venv: ## the virtual environment of lint and tests (.venv), from tests/requirements.lock
	@$(EPD) venv
