# make train   sets everything up and runs the main job: trains, evaluates and converts the demo
# make test    sets everything up and runs the tests
# make test-cluster    runs two hosts, then a SLURM cluster of two nodes, on this machine and jobs on them, as root (docs/clusters.md)
# make lint    checks style, imports between layers, and types
#
# PYTHON=python3.12      another interpreter (3.10 or later)
# TORCH=my-constraints   another constraints file for torch: `make train TORCH=` keeps the torch pip would choose
# TORCH_INDEX=URL        where pip looks for torch first, such as https://download.pytorch.org/whl/cpu for the small CPU
#                        build on a machine whose package index serves the CUDA build
# RANKS=4                processes on a CPU-only machine
# TESTERS=4              processes (3) that `make test` shares the test files out to

PYTHON ?= python3
TORCH ?= constraints-torch.txt
TORCH_INDEX ?=
RANKS ?= 2
TESTERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRAIN := launchers/train.py --ds_config ds_configs/zero3_bf16.json

# The launcher finds ranks' python through PATH; compiled DeepSpeed ops stay in the environment that they fit.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export VIRTUAL_ENV := $(CURDIR)/$(VENV)

ifneq ($(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null),)
DEEPSPEED := deepspeed --quiet
else
DEEPSPEED := deepspeed --quiet --num_gpus $(RANKS)
export DS_ACCELERATOR := cpu
# One thread a rank: with more, ranks fight for the cores.
export OMP_NUM_THREADS ?= 1
endif

.PHONY: train test test-cluster lint setup clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

train: $(READY)
	@run="$(DEEPSPEED) $(TRAIN)"; \
	if [ -e runs/demo ]; then n=2; while [ -e runs/demo-$$n ]; do n=$$((n + 1)); done; run="$$run train.name=demo-$$n"; fi; \
	echo "+ $$run"; $$run

test: $(READY)
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-cluster: $(READY)
	bash tests/cluster/hosts.sh
	bash tests/cluster/slurm.sh

lint: $(READY)
	$(BIN)/python -m pip install -q -e '.[lint]' -c constraints.txt
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports && $(BIN)/mypy

setup: $(READY)

# Installed again only when what is installed has changed.
$(READY): setup.cfg setup.py pyproject.toml constraints.txt $(TORCH) Makefile tools/check_machine.sh
	@PYTHON="$(PYTHON)" sh tools/check_machine.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(if $(TORCH),-c $(TORCH)) torch
	$(BIN)/python -m pip install -q -e '.[test]' -c constraints.txt $(if $(TORCH),-c $(TORCH))
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis
