# Two commands: `make pretrain` and `make test`. Both set up what is missing first.

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VERSIONS := 3.11 3.12 3.13
# Of the supported versions, those that this machine has besides the one in use.
PYTHONS ?= $(foreach version,3.12 3.13,$(firstword $(wildcard \
	/usr/bin/python$(version) /usr/local/bin/python$(version) $(HOME)/.pyenv/versions/$(version).*/bin/python$(version))))

# What test-gpu runs by: often an image's own Python, with its own torch.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# The door of each, and what stands right behind it: the scaling policy, the process group, an engine of every stage.
NEWEST_TESTS := tests/jobs/cluster/test_ray_internals.py tests/jobs/checkpoint/test_deepspeed_internals.py \
	tests/jobs/control/test_node_policy.py tests/jobs/rank/test_process_group.py tests/jobs/rank/test_standby.py \
	tests/jobs/checkpoint/test_zero_state.py

.DEFAULT_GOAL := help
.PHONY: help install pretrain down fix check test test-pythons test-newest test-gpu bench-gpu test-slow test-hosts soak fuzz bench-recovery bench-hosts bench-plan bench-model bench-loader bench-busy-loader bench-checkpoint bench-consolidate bench-scale bench-grains bench-probes bench-memory bench-profile bench-history bench-store

help:  ## Show these lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## Set up .venv with pinned versions; quick when there is nothing to do

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; "%d.%d" % sys.version_info[:2] in "$(VERSIONS)".split() or sys.exit("Python 3.11 to 3.13 is needed; set PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
		package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		echo "installing $$package, which Debian ships apart from Python"; \
		apt-get -qq update && apt-get -qq install -y $$package >/dev/null && $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e '.[local,export,dev]'
	@# By all cores at once, which pip does not; else every worker of the first run compiles the same files again.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $(INSTALLED)

pretrain: $(INSTALLED)  ## The main job, end to end; IMAGES=DIR takes your own photographs
	@infra/local/bring prometheus
	@$(BIN)/convmae demo $(if $(IMAGES),--images "$(IMAGES)")

down: $(INSTALLED)  ## Stop the local stack; data is kept
	@$(BIN)/convmae down

fix: $(INSTALLED)  ## Format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(INSTALLED)  ## Lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples
	$(BIN)/lint-imports

test: check  ## Checks, then all tests but the slow ones
	@infra/local/bring prometheus ip chromium amtool jpegtran azurite
	$(BIN)/python -m pytest -n 2

test-pythons:  ## The fast tests on each other Python that is found, or in PYTHONS="/path/to/python3.13 ..."
	@test -n "$(strip $(PYTHONS))" || echo "no other Python is found: skipped; name them with PYTHONS"
	@for python in $(PYTHONS); do \
		venv=.venv-$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
		$(MAKE) --no-print-directory install PYTHON=$$python VENV=$$venv && \
		$$venv/bin/python -m pytest -n 2 -m 'not slow and not soak and not stack' || exit 1; \
	done

test-newest:  ## What is used of the insides of Ray and DeepSpeed, against the newest of both; see docs/private-api.md
	@rm -rf .venv-newest && $(PYTHON) -m venv .venv-newest
	@grep -vE '^(ray|deepspeed)==' constraints.txt >.venv-newest/constraints.txt
	@.venv-newest/bin/pip install -qq --no-compile --disable-pip-version-check -c .venv-newest/constraints.txt -e '.[local,export,dev]'
	@.venv-newest/bin/pip list --format=freeze | grep -E '^(ray|deepspeed)=='
	@.venv-newest/bin/python -m pytest -k 'not pinned_version' $(NEWEST_TESTS)

test-gpu:  ## What needs a GPU, by an interpreter with torch, DeepSpeed, simplejpeg, safetensors, pydantic, NumPy, pytest: GPU_PYTHON=...
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		CONVMAE_TEST_DEVICE=cuda $(GPU_PYTHON) -m pytest -p no:cacheprovider --confcutdir=tests/gpu tests/gpu; \
	else echo "test-gpu: torch sees no GPU here: skipped"; fi

bench-gpu:  ## Images a second, MFU, memory on a GPU, as a table and as bench-gpu.json; GPU_PYTHON as for test-gpu
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		PYTHONPATH=. $(GPU_PYTHON) benchmarks/bench_gpu.py $(if $(IMAGES),--images "$(IMAGES)"); \
	else echo "bench-gpu: torch sees no GPU here: skipped"; fi

test-slow: $(INSTALLED)  ## The tests that take minutes
	$(BIN)/python -m pytest -m slow

test-hosts: $(INSTALLED)  ## A cluster of several hosts whose links are cut; needs root and iproute2
	$(BIN)/python -m pytest -m 'not soak' tests/hosts

soak: $(INSTALLED)  ## A run that is killed at random for half an hour; CONVMAE_SOAK_MINUTES and CONVMAE_SOAK_SEED set it
	$(BIN)/python -m pytest -m soak --log-cli-level=WARNING

fuzz: $(INSTALLED)  ## Odd input for ten minutes, to all that reads any; CONVMAE_FUZZ_MINUTES and CONVMAE_FUZZ_SEED set it
	CONVMAE_FUZZ_MINUTES=$${CONVMAE_FUZZ_MINUTES:-10} $(BIN)/python -m pytest -m fuzz tests/fuzz

bench-recovery: $(INSTALLED)  ## From a failure to the next step: ranks and nodes killed, added and drained
	$(BIN)/python benchmarks/bench_recovery.py

bench-hosts: $(INSTALLED)  ## From a host that falls silent to the next step; needs root and iproute2
	$(BIN)/python benchmarks/bench_hosts.py

bench-model: $(INSTALLED)  ## Forward and backward of the model, against its dense reference and MAE; operations and bytes
	$(BIN)/python benchmarks/model_traffic.py
	$(BIN)/python benchmarks/bench_model.py

bench-loader: $(INSTALLED)  ## Images a second beside other loaders; IMAGES=DIR takes your own, QUICK=1 is a first look
	$(BIN)/python benchmarks/bench_loader.py $(if $(IMAGES),--images "$(IMAGES)") $(if $(QUICK),--quick)

bench-busy-loader: $(INSTALLED)  ## The loader beside a busy main thread, by threads and by processes; on an idle machine of two cores or more
	$(BIN)/python benchmarks/bench_busy_loader.py $(if $(IMAGES),--images "$(IMAGES)")

bench-checkpoint: $(INSTALLED)  ## How long training stands still for a checkpoint, beside DeepSpeed's own save
	$(BIN)/python benchmarks/bench_checkpoint.py

bench-consolidate: $(INSTALLED)  ## A checkpoint to one file, from S3 to S3, against DeepSpeed's own tool
	$(BIN)/python benchmarks/bench_consolidate.py

bench-plan: $(INSTALLED)  ## What a plan over 2,000,000,000 samples costs
	$(BIN)/python benchmarks/bench_plan.py

bench-grains: $(INSTALLED)  ## The cost of the same bits at any world size
	$(BIN)/python benchmarks/bench_grains.py

bench-history: $(INSTALLED)  ## Commands on runs of 500,000 steps and 300 attempts, before and after compaction, from a local S3
	$(BIN)/python benchmarks/bench_history.py

bench-store: $(INSTALLED)  ## CPU time of reading from S3, by s3fs and by obstore
	$(BIN)/python benchmarks/bench_store.py

bench-probes: $(INSTALLED)  ## How much probes slow the training beside them; CPUS=N for the training, half of the cores by default
	$(BIN)/python benchmarks/bench_probes.py $(if $(CPUS),--cpus $(CPUS))

bench-memory: $(INSTALLED)  ## What memory checkpoints cost a step, on two nodes of one core
	$(BIN)/python benchmarks/bench_memory.py

bench-profile: $(INSTALLED)  ## What a profile of a rank costs the steps after it, on two nodes of one core
	$(BIN)/python benchmarks/bench_profile.py

bench-scale: $(INSTALLED)  ## What grows with the ranks: restoring, figures, deletes, polls; up to 1,024 on paper
	$(BIN)/python benchmarks/bench_scale.py
