# Each target that runs something finds the development environment, or builds it, by itself.
PYTHON ?= python3
RUN = python=$$($(PYTHON) tools/environment.py) && PYTHONPATH="$(CURDIR)/src" "$$python"

.DEFAULT_GOAL := help
.PHONY: help demo test gpu lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'ARGS="..." reaches demo and test; PYTHON=python3.12 builds the environment of another python.'

demo: ## show what the library does
	@$(RUN) -m efficient_attention.cli demo $(ARGS)

test: ## run the tests
	@$(RUN) -m pytest $(ARGS)

BENCH = $(RUN) -m efficient_attention.cli bench
gpu: ## check and measure the kernels on an NVIDIA GPU
	@$(RUN) -m pytest tests/ops/test_triton_interpreter.py tests/ops/test_triton_module.py tests/ops/test_triton_compilation.py
	@$(BENCH) operator --device cuda --positions 256 1024 4096 16384 65536 262144 1048576 --dtypes bfloat16 float32 \
		--modes forward backward training
	@$(BENCH) module --device cuda --maps 256 1024 --heads 8 1 --dtypes bfloat16 float32 --modes forward training

lint: ## check style, form and types
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy

format: ## sort the imports, lay out the code
	@$(RUN) -m ruff check --select I --fix
	@$(RUN) -m ruff format

clean: ## remove caches and builds, not the environment
	@rm -rf build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find src tests tools -name __pycache__ -prune -exec rm -rf {} +
