# make quickstart   train a small model on a laptop, minutes
# make test         what CI runs, 14 minutes on two cores with the installation
# make parity       all models against the official ones, most of an hour

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: quickstart test parity lint

quickstart: $(VENV)/installed
	$(RUN) -m hybrid_flax.main --config=configs/quickstart.py --workdir=runs/quickstart

test: lint
	$(RUN) -m pytest -n 2 --dist=loadfile

parity: $(VENV)/installed
	$(RUN) -m tests.parity $(if $(SAVE),--save=$(SAVE))

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hybrid_flax needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@
