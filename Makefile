# Every target stands on a .venv that the first one builds; later runs use it as it is.
#   make serve ARGS="--port 9000"                                    arguments of the command
#   make serve PYTHON=python3.12                                     another interpreter
#   make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu      torch without CUDA
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip
READY := .venv/.ready

.PHONY: help serve test check bench test-gpu test-interop mutation
help:
	@echo "make serve | test | check | bench | test-gpu | test-interop | mutation    (ARGS=... is passed on; see the top of the Makefile)"
serve: $(READY)
	@$(BIN)/octavo serve $(ARGS)
test: $(READY)
	@$(BIN)/python -m pytest -m "not gpu and not slow" $(ARGS)
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
bench: $(READY)
	@$(BIN)/octavo bench cpu $(ARGS)
test-gpu: $(READY)
	@$(BIN)/python -m pytest -m "gpu and not slow" $(ARGS)
# Layers that AutoAWQ and AutoGPTQ pack, in environments of their own below build/interop.
test-interop: $(READY)
	@$(BIN)/python -m pytest -m slow tests/interop -s $(ARGS)
# Mutants of the scheduler and the block manager; mutmut wants the import root to be called src.
mutation: $(READY)
	@rm -rf build/mutation && mkdir -p build/mutation && cp -r core build/mutation/src
	@cp -r tests pyproject.toml build/mutation && cd build/mutation && PATH=$(CURDIR)/$(BIN):$$PATH mutmut run

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "There is no $(PYTHON) here: install Python 3.11 or newer, or name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old: Octavo needs 3.11 or newer; name one with make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make environments: install its venv module (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --version >/dev/null 2>&1 || \
	  { echo "The environment .venv has no pip: delete .venv and run make again." >&2; exit 1; }
	@echo "Setting up .venv (once; a few minutes)"
	@$(if $(TORCH_INDEX),$(PIP) install --no-deps -c constraints.txt --index-url $(TORCH_INDEX) torch)
	@$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@
