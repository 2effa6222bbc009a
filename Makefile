# make quickstart   train a small model on a laptop, minutes
# make test         what CI runs: every promise and every model, under 15 minutes on two cores
# make test-all     all tests, and a short chaos run; nightly
# make durations    make test, and its seconds by file into tests/durations.json
# make kernels      compiles the kernels for TPUs and an H200, about an hour
# make model        checks, measures and documents one model; NAME=
# make tables       the tables in documents and the expanded configs, anew
# make parity       all models against the official ones, most of an hour
# make chaos        a small run disturbed 300 times must end as if it had not been; FAULTS=, SEED=
# make soak         two processes, one of them killed ten times; KILLS=, SEED=

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: quickstart test test-all durations parity kernels chaos soak lint model tables

quickstart: $(VENV)/installed
	$(RUN) -m hybrid_flax.main --config=configs/quickstart.py --workdir=runs/quickstart

PYTEST = $(RUN) -m pytest -n 2 --dist=loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)
	$(RUN) -m tests.chaos --faults=36

durations: $(VENV)/installed
	$(PYTEST) -m "not slow" --record-durations

parity: $(VENV)/installed
	$(RUN) -m tests.parity $(if $(SAVE),--save=$(SAVE))

PARITY = benchmarks/results/parity.json

model: $(VENV)/installed
	@test -n "$(NAME)" || { echo "whose? make model NAME=gcvit_t"; exit 2; }
	$(RUN) -m tests.parity $(NAME) --save=$(PARITY)
	$(MAKE) tables
	$(RUN) -m pytest -k "$(NAME) or stale or generated" $(MODEL_TESTS)

# Every promise that is held for each model, each config or each table by its name.
MODEL_TESTS = tests/models tests/configs tests/training/test_optimizers.py tests/docs \
  tests/benchmarks/test_plans_table.py

tables: $(VENV)/installed
	$(RUN) -m hybrid_flax.settings
	$(RUN) -m docs.generate
	$(RUN) -m tests.configs.test_configs

kernels: $(VENV)/compilers
	$(RUN) -m tests.compile_kernels $(if $(SAVE),--save=$(SAVE)) $(if $(CHIPS),--chips=$(CHIPS))
	$(RUN) -m pytest -m kernels

chaos: $(VENV)/installed
	$(RUN) -m tests.chaos --faults=$(or $(FAULTS),300) --seed=$(or $(SEED),0)

soak: $(VENV)/installed
	$(RUN) -m tests.soak --kills=$(or $(KILLS),10) --seed=$(or $(SEED),0)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hybrid_flax needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

# The compilers of TPUs and of NVIDIA GPUs, 5 GB. They belong to the JAX that is installed.
$(VENV)/compilers: $(VENV)/installed
	$(RUN) -m pip install --quiet libtpu \
	  "jax[cuda13]==$$($(RUN) -c 'import jax; print(jax.__version__)')"
	touch $@
