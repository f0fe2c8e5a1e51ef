# `make help` lists the targets. Everything runs in .venv, made by pip alone from the pinned constraints.txt.

SHELL  := bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=

RUN     := $(VENV)/bin
INSTALL := $(RUN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
RUNTIME := $(VENV)/.runtime
TOOLS   := $(VENV)/.tools
CACHES  := .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
STUBS_CHECK := pytest -q tests/backends/test_tensorrt_types.py
PINS    := pyproject.toml constraints.txt requirements/demo.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(RUNTIME) ## compress an ImageNet MobileNetV2 into an ONNX Runtime engine and measure it
	@$(RUN)/python examples/demo.py $(ARGS)

test: $(TOOLS) ## run the tests, the slow ones left out
	@$(RUN)/python -m pytest -n $(JOBS) -m "not slow" $(ARGS)

test-slow: $(TOOLS) ## run the slow tests
	@$(RUN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

lint: $(TOOLS) ## style, formatting, types (TensorRT's calls too), and who may import whom
	@status=0; for check in "ruff check" "ruff format --check" mypy "lint-imports --no-logo" "$(STUBS_CHECK)"; do \
		$(RUN)/$$check || status=1; \
	done; exit $$status

bench: $(TOOLS) ## measure coverage, compile time, growth and overhead; figures go to benchmarks/results/
	@for name in coverage compile_time growth engine_overhead; do \
		$(RUN)/python -m benchmarks.$$name || exit 1; \
	done

docs: $(TOOLS) ## run every snippet of the documentation
	@$(RUN)/python -m pytest tests/test_docs.py $(ARGS)

clean: ## remove the environment and every cache
	@rm -rf $(VENV) $(CACHES) build dist fxcompress.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The package and what the demo reads. setuptools comes first, so that the build needs no environment of its own.
$(RUNTIME): $(PINS)
	@echo "Installing fxcompress into $(VENV); the next run skips this."
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable .
	@$(INSTALL) --no-deps --requirement requirements/demo.txt
	@touch $@

$(TOOLS): $(RUNTIME)
	@echo "Installing the development tools into $(VENV); the next run skips this."
	@$(INSTALL) --no-build-isolation --editable '.[bench,dev,openvino,report,tensorrt,train]'
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/stubs tensorrt-stubs  # types only; not importable
	@touch $@
