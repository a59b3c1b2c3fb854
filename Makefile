# make quickstart   set up everything and train a small GPT with switchable sparse-dense learning on real text
#                   (CONFIG=examples/bert/quickstart.json: a small BERT)
# make test         set up everything and run the tests
# make test-layouts   train on the whole matrix of layouts; takes many minutes
# make test-docs    run the commands of the documents; a few minutes
# make test-faults  kill ranks of small jobs 50 times and start the jobs again (about 7 minutes)
# make test-triton-compile   compile the GPU kernels for a Hopper GPU, without one; several minutes
# make test-mpi, make test-multinode, make test-slurm    real launchers; each says which Debian packages it needs
# make lint         ruff and mypy;   make docs: generate docs/config.md

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
CONFIG ?= examples/quickstart/ds.json
# Of a config below examples/bert or examples/t5, whose tokenizers reserve tokens.
FAMILY := $(filter bert t5,$(subst /, ,$(CONFIG)))
CONSTRAINTS := constraints.txt
# Three files of tests at a time, also on two cores: many wait for one rank, or for each other's.
IN_PARALLEL := -n 3 --dist loadfile

.PHONY: quickstart test test-layouts test-docs test-faults test-triton-compile test-mpi test-multinode test-slurm lint docs clean

quickstart: $(VENV)/.installed
	$(BIN)/python tools/embedded_corpus.py --out data/embedded$(addprefix -,$(FAMILY)) $(addprefix --reserve ,$(FAMILY))
	PATH="$(BIN):$$PATH" deepspeed pretrain_ssd.py --ds_config $(CONFIG)

test: $(VENV)/.installed-dev
	PATH="$(BIN):$$PATH" pytest $(IN_PARALLEL)

test-layouts: $(VENV)/.installed-dev
	PATH="$(BIN):$$PATH" pytest $(IN_PARALLEL) -m layouts

test-docs: $(VENV)/.installed-dev
	PATH="$(BIN):$$PATH" pytest -m docs

test-faults: $(VENV)/.installed-dev
	$(BIN)/python -m tests.faults.kill --runs 50

test-triton-compile: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.triton_compile

test-mpi test-multinode test-slurm: test-%: $(VENV)/.installed-dev
	$(BIN)/python -m tests.$*.check

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python tools/config_reference.py --write

clean:
	rm -rf $(VENV)

# torch first: DeepSpeed's build looks for it.
$(VENV)/.installed: setup.py $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@
