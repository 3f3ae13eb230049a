# The commands of this project; see README.md. Each creates what it needs on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
# Python compiles a module when it is first imported; compiling all of them takes a third of the installation. setuptools warns
# about every editable installation, which says nothing to who installs this one.
INSTALL := PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --disable-pip-version-check --no-compile $(addprefix -c ,$(CONSTRAINTS))

.PHONY: reproduce install test test-fast test-slurm coverage lab browse docs lint types format constraints clean

reproduce: $(VENV)/.installed  ## the gap between dense, PR-MoE and MoE-128 on a laptop (minutes on 2 cores)
	$(BIN)/moelab run pr-moe --scale quick -p seeds=3

install: $(VENV)/.installed  ## the environment with the command moelab

# Compiled code is kept, whatever the shell says: the tests start some hundred processes. Files go out in the order of tests/conftest.py.
TEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test: $(VENV)/.installed-test  ## run the tests
	$(TEST) -n auto --dist loadfile --no-loadscope-reorder --durations=15

FAST := not (slow or multiprocess or notebook or slurm or gpu)

test-fast: $(VENV)/.installed-test  ## those that need no other process, notebook, cluster or GPU, and no long training
	$(TEST) -n auto --dist loadfile --no-loadscope-reorder -m "$(FAST)"
	@echo "left out: tests marked slow, multiprocess, notebook, slurm or gpu; make test runs them"

test-slurm: $(VENV)/.installed-test  ## the tests on a real Slurm on this machine (slurm/README.md says what it needs)
	MOELAB_SLURM=require $(TEST) tests/cluster --durations=10

coverage: $(VENV)/.installed-test  ## which lines the fast tests run, in .moelab/coverage/html; TESTS=... for others
	rm -rf .moelab/coverage && mkdir -p .moelab/coverage
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest $(or $(TESTS),-m "$(FAST)")
	$(BIN)/coverage combine -q && $(BIN)/coverage html -q && $(BIN)/coverage report --skip-covered | tail -1

lab: $(VENV)/.installed  ## JupyterLab on the notebooks
	$(BIN)/moelab lab

browse: $(VENV)/.installed  ## the results page on localhost
	$(BIN)/moelab browse

DOCS := .moelab/docs
docs: $(VENV)/.installed-test  ## the documentation with the API reference and a search, in .moelab/docs/html; no network
	rm -rf $(DOCS) && mkdir -p $(DOCS)/source
	cp -r README.md LOG.md CHANGELOG.md CONTRIBUTING.md docs slurm $(DOCS)/source/ && ln -s $(CURDIR)/results $(DOCS)/source/
	$(BIN)/python -m sphinx -q -c docs $(SPHINX) $(DOCS)/source $(DOCS)/html
	@echo "$(DOCS)/html/README.html"

lint: types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

TYPES := .moelab/types
types: $(VENV)/.installed-test  ## check the types, in the tree as it is installed: kernels/ is moelab/kernels
	rm -rf $(TYPES) && mkdir -p $(TYPES)/moelab && ln -s $(CURDIR)/moelab/* $(CURDIR)/kernels $(TYPES)/moelab/
	cd $(TYPES) && $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir ../mypy -p moelab

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moelab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Choose one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "creating $(VENV) failed; on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip || true  # takes half the time of Python 3.11's own pip

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "installing into $(VENV) (torch and Jupyter; a few minutes the first time)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.installed

constraints: $(VENV)/.installed-test  ## pin the installed versions, those that do not depend on the machine
	grep '^#' constraints.txt > constraints.tmp
	$(BIN)/pip freeze --exclude-editable | grep -viE '^(torch|triton|nvidia[^=]*)==' >> constraints.tmp
	mv constraints.tmp constraints.txt

clean:  ## remove the environment; runs, tokens and results stay
	rm -rf $(VENV)
