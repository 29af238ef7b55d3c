# `make demo` and `make test` set up .venv themselves and do it once; `make help` lists the rest.

PYTHON ?= python3.11
ifndef LOCK
LOCK := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
endif

VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages-$(LOCK)
PROJECT := $(VENV)/.project
INSTALL := -m pip --disable-pip-version-check install -qq --no-compile
PIP := $(BIN)/python $(INSTALL) --no-deps
RECBOLE := .venv-recbole
DUCKDB := .venv-duckdb

# A set-up counts if it was finished, in this folder, and its Python still runs.
ifneq ($(shell $(BIN)/python -c 'print(open("$(PACKAGES)").read())' 2>/dev/null),$(CURDIR))
.PHONY: $(PACKAGES)
endif

# Python compiles what is imported, once: processes that may not keep it import vllm three times slower.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test soak bench tables lint setup recbole duckdb clean java
.NOTPARALLEL:

help:
	@echo "make demo   set up, then run the whole pipeline on made-up data (negrec demo)"
	@echo "make test   set up, then run the linters, the type checker and all tests"
	@echo "make soak   kill -9 drivers and writers at random moments, KILLS=200 of each (under an hour)"
	@echo "make bench  measure speeds (over an hour; QUICK=1: minutes; ONLY=swing: one of them): tests/bench/RESULTS.md"
	@echo "make tables train and judge on every public data set (hours; QUICK=1: minutes; SEQUENTIAL=1: RecBole, too): train/RESULTS.md"
	@echo "make lint   the linters and the type checker alone"
	@echo "make setup  the environment alone: $(VENV), from conf/lock/$(LOCK).txt"
	@echo "make recbole  $(RECBOLE), for evaluation beside sequential recommenders"
	@echo "make duckdb  $(DUCKDB), an independent reader that tests compare with (part of make test)"
	@echo "make clean  remove the environments and caches"
	@echo "LOCK=cpu or LOCK=gpu chooses the packages (default: gpu where nvidia-smi works)"
	@echo "PYTHON=/path/to/python3.11 chooses the Python"

demo: java setup
	@$(BIN)/negrec demo

# Two workers, each with whole files: most tests keep little more than one core busy, and a file shares its
# Spark session and its warehouse. Files keep the order that tests/conftest.py gives them.
test: java lint duckdb
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

soak: java setup
	$(BIN)/python -m pytest -k 'killed or under_load' --kills $(or $(KILLS),200) --list-users 1000000

bench: java setup
	$(BIN)/python tests/bench/run.py $(if $(QUICK),--quick) $(ONLY)

tables: java setup $(if $(SEQUENTIAL),recbole)
	$(BIN)/python -m train.tables $(if $(QUICK),--quick) $(if $(SEQUENTIAL),--sequential $(RECBOLE)/bin/python)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

setup: $(PROJECT)

# Spark needs Java 17 or newer with the vector module, which some cut-down runtimes lack.
java:
	@version=$$("$${JAVA_HOME:+$$JAVA_HOME/bin/}java" --add-modules=jdk.incubator.vector -version 2>&1 \
	  | sed -n 's/.* version "\([0-9]*\).*/\1/p'); \
	if [ "$${version:-0}" -lt 17 ]; then \
	  echo "negrec: Spark needs Java 17 or newer (with jdk.incubator.vector):" \
	    "apt-get install openjdk-17-jre-headless" >&2; exit 1; \
	fi

# PyTorch's CPU build comes first, so that an index without it is told apart from any other failure.
# Three pips at once then share the list: one alone keeps a single core busy for a minute. pyspark, the one
# package that is built here, is not compressed in between.
$(PACKAGES): conf/lock/$(LOCK).txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "negrec: '$(PYTHON)' is no Python 3.11: apt-get install python3.11-venv," \
	    "or name one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "negrec: installing the packages of $< into $(VENV), once (2 to 5 minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) $$(grep '^setuptools==' $<)
ifeq ($(LOCK),cpu)
	@$(PIP) $$(grep '^torch==' $<) || { \
	  echo "negrec: your package index has no CPU build of PyTorch; PIP_EXTRA_INDEX_URL=URL adds one" \
	    "that has (pytorch.org, Get Started, names its URL)" >&2; exit 1; }
endif
	@grep -v '^[-#]' $< | xargs -n 75 -P 3 $(PIP) --no-build-isolation $$(grep '^-' $<) \
	  --config-settings=--build-option=--compression=stored
	@echo '$(CURDIR)' > $@

$(PROJECT): $(PACKAGES) pyproject.toml
	@$(PIP) --no-build-isolation -e .
	@touch $@

recbole: $(RECBOLE)/.packages

# PyTorch comes with what its build asks for: CUDA libraries, where the index has no CPU build.
$(RECBOLE)/.packages: conf/lock/recbole.txt
	@echo "negrec: installing the packages of $< into $(RECBOLE), once (1 to 3 minutes)"
	@$(PYTHON) -m venv --clear $(RECBOLE)
	@$(RECBOLE)/bin/python $(INSTALL) -c $< torch
	@$(RECBOLE)/bin/python $(INSTALL) --no-deps -r $<
	@touch $@

duckdb: $(DUCKDB)/.packages

# Without it its tests are skipped, so that all others run.
$(DUCKDB)/.packages: conf/lock/duckdb.txt
	@$(PYTHON) -m venv --clear $(DUCKDB) && $(DUCKDB)/bin/python $(INSTALL) --no-deps -r $< && touch $@ \
	  || { rm -rf $(DUCKDB); echo "negrec: no $(DUCKDB), so tests that read tables by DuckDB are skipped" >&2; }

clean:
	rm -rf $(VENV) $(RECBOLE) $(DUCKDB) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
