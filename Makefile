# Everything that a fresh clone does. Needs Python (3.10 to 3.13), pip, make and, for the CPU engine, a C++ compiler.
#
#   PYTHON   the Python that the environment is made from        (make PYTHON=python3.12 test)
#   JOBS     processes that share the tests                      (make JOBS=8 test)
#   TRITONS  further versions that `make test-all` tries kernels with
#   PART     i/n: the i-th of n parts of `make test-all`, which take about as long  (make PART=1/6 test-all)

PYTHON ?= python3
JOBS ?= 2
TRITONS ?= 3.6.0 3.9.0
PART ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*.cpp csrc/*/*.h)

# Ranks and test processes share the cores already: one thread of arithmetic each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal
RUN_COMPILED := tests/kernels/emulator tests/kernels/proof
SWEEP := $(PYTEST) $(if $(PART),--part $(PART))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench clean $(TRITONS:%=test-triton-%)

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP) ## from text to chat: train a tokenizer and a small model, fine-tune it in another layout, ask it
	$(BIN)/python examples/pretrain_and_chat.py

test: $(STAMP) ## the tests, in two runs: kernels in Triton's interpreter, then everything else
	TRITON_INTERPRET=1 $(PYTEST) -m "interpreter and not slow"
	$(PYTEST) -m "not interpreter and not gpu and not slow"

test-all: $(STAMP) ## the long sweep: every test but those that need a GPU, and the kernels with other versions of triton
	TRITON_INTERPRET=1 $(SWEEP) -m "interpreter"
	$(SWEEP) -m "not interpreter and not gpu"
	@set -e; for version in $(TRITONS); do $(MAKE) --no-print-directory test-triton-$$version; done

# One version of triton in a folder of its own, which stands before the environment's on Python's path. pip is told
# nothing of torch, so this works with any build of it, and the pinned triton stays as it is.
.venvs/triton-%: $(STAMP)
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*

$(TRITONS:%=test-triton-%): test-triton-%: .venvs/triton-%
	PYTHONPATH=$< $(BIN)/python -c "import triton; print('triton', triton.__version__); assert triton.__version__ == '$*'"
	PYTHONPATH=$< TRITON_INTERPRET=1 $(SWEEP) -m "interpreter and not slow"
	PYTHONPATH=$< $(SWEEP) -m "aot and not slow" $(RUN_COMPILED:%=--ignore %)
	PYTHONPATH=$< $(SWEEP) -m "not interpreter and not gpu and not slow" $(RUN_COMPILED)

# mypy sees the package as users get it: installed whole. On the tree, and through a plain editable install, it would
# not find fusemesh.kernels and fusemesh.hybrid, and report success on the few files it sees.
lint: $(STAMP) ## formatting, lint, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .venvs/types
	FUSEMESH_NO_ENGINE=1 $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venvs/types .
	MYPYPATH=.venvs/types $(BIN)/mypy -p fusemesh

bench: $(STAMP) ## every backend against PyTorch's own; tables, and JSON under bench/results/
	$(BIN)/pytest bench

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[app,mpi,test,lint]"
	@touch $@

clean: ## remove environments and everything built
	rm -rf .venv .venvs build dist ./*.egg-info csrc/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
