# make demo   shard two real models over two local processes and compare with the unsharded ones
# make test   lint, types, and the whole test suite against the built wheel
# Both make a virtual environment of their own, $(VENV), from constraints.txt.

PYTHON ?= python3
VENV ?= .venv
# Two workers: what one rank or process leaves of two cores, the other takes.
PYTEST_ARGS ?= -n 2 --dist worksteal

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SOURCES := $(shell find autotp -name '*.py' -o -name py.typed) pyproject.toml README.md LICENSE

# One thread a rank: the ranks share this machine's cores. Nothing is fetched from a model hub.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint wheel clean

demo: $(VENV)/.installed
	$(PY) -m torch.distributed.run --standalone --nproc-per-node 2 examples/demo.py

# Safe path: `autotp` is what is installed, never the folder beside this file.
test: $(VENV)/.installed-test lint
	AUTOTP_TEST_INSTALLED=1 PYTHONSAFEPATH=1 $(PY) -m pytest tests $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

wheel: $(VENV)/.wheel

clean:
	rm -rf dist $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "autotp needs Python 3.11 or newer; use make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.wheel: $(SOURCES) constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt hatchling
	rm -rf dist
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .
	touch $@

# The second line replaces an older build of the same version. What is imported is compiled then: most never is.
$(VENV)/.installed: $(VENV)/.wheel
	$(PIP) install -q --no-compile -c constraints.txt "$$(echo dist/autotp-*.whl)[demo]"
	$(PIP) install -q --no-compile --no-deps --force-reinstall dist/autotp-*.whl
	touch $@

$(VENV)/.installed-test: $(VENV)/.wheel
	$(PIP) install -q --no-compile -c constraints.txt "$$(echo dist/autotp-*.whl)[demo,test,lint]"
	$(PIP) install -q --no-compile --no-deps --force-reinstall dist/autotp-*.whl
	touch $@
