# Everything here works on a fresh Debian or Ubuntu machine: what is missing is installed first,
# Debian packages through apt-get (as root or with sudo), Python packages into .venv alone.
#   make test ARGS="-k sshd -x"     arguments for pytest
#   make test PYTHON=python3.12     another Python than python3

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO_PACKAGES := unixodbc libsqliteodbc
TEST_PACKAGES := $(DEMO_PACKAGES) openssh-server postgresql odbc-postgresql sudo systemd
CACHE ?= /var/cache/sgsync-ci

.DELETE_ON_ERROR:
.PHONY: help demo test test-newest lint bench faults clean demo-packages test-packages

help: ## lists the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 19

demo: demo-packages $(VENV)/demo.stamp ## nights of sync and schoolinks on servers of its own; ARGS=--keep to try more
	$(BIN)/python tests/demo.py $(ARGS)

test: test-packages $(VENV)/test.stamp ## all tests
	$(BIN)/python -m pytest $(ARGS)

test-newest: ## the command-line tests on the newest Python to be had
	@PYTHON="$(PYTHON)" PACKAGES="$(TEST_PACKAGES)" CACHE="$(CACHE)" \
	    sh tests/support/newest.sh $(or $(ARGS),tests/test_cli.py)

# the third line: a Python that is too old must be able to compile sgsync.py, which then says so
lint: $(VENV)/test.stamp ## format, rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ruff check --quiet --isolated --target-version py38 --select PLE0100 sgsync.py
	$(BIN)/mypy

bench: test-packages $(VENV)/test.stamp ## speed and memory, as a table
	$(BIN)/python tests/bench.py $(ARGS)

faults: test-packages $(VENV)/test.stamp ## kills and cuts at hundreds of points, as a table
	$(BIN)/python tests/faults.py $(ARGS)

clean: ## removes .venv, build and caches; history/ and ssh/ stay
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

demo-packages:
	@sh tests/support/install.sh $(DEMO_PACKAGES)

test-packages:
	@sh tests/support/install.sh $(TEST_PACKAGES)

# asyncssh in the version that tests/requirements.txt names
$(VENV)/demo.stamp: requirements.txt tests/requirements.txt $(BIN)/python $(BIN)/pip
	$(PIP) -r requirements.txt -c tests/requirements.txt asyncssh
	@touch $@

# mypy overlooks the types that pyodbc brings, a single file, unless they stand in a stub package.
$(VENV)/test.stamp: requirements.txt tests/requirements.txt $(BIN)/python $(BIN)/pip
	$(PIP) -r requirements.txt -r tests/requirements.txt
	@cd $(VENV)/lib/python3*/site-packages && mkdir -p pyodbc-stubs && \
	    cp pyodbc.pyi pyodbc-stubs/__init__.pyi
	@touch $@

# Debian's python3 comes without ensurepip, which venv needs. A .venv whose Python is gone (a new
# release of the system) is made anew.
$(BIN)/python $(BIN)/pip &:
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || sh tests/support/install.sh python3-venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'Python 3.10 or newer is needed. Try: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
