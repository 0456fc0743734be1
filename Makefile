# `make quickstart` runs the whole line on a small text world, `make test` passes the tests. Each sets up what it needs
# in .venv first; nothing but Python and make has to be there.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# what makes an installation out of date: the rest of the source is read where it lies
INSTALLED = pyproject.toml constraints.txt hatch_build.py $(wildcard src/bridle/*/*.[ch]) src/bridle/native/compiling.py
PIP = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test check clean

help:
	@echo "make quickstart   SFT, reward model and PPO on a small text world, in minutes"
	@echo "make test         the tests"
	@echo "make check        what is checked besides the tests: style, types, house rules"
	@echo "make clean        remove $(VENV)"

quickstart: $(VENV)/.ready
	$(BIN)/bridle quickstart $(ARGS)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.ready-dev
	BIN=$(BIN) scripts/check

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Bridle needs Python 3.11 or newer, and $(PYTHON) is not; try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.ready: $(INSTALLED) | $(BIN)/python
	$(PIP) -e '.[language,control]'
	@touch $@

$(VENV)/.ready-dev: $(INSTALLED) | $(BIN)/python
	$(PIP) -e '.[language,lora,control,tensorboard,dev]'
	@touch $@ $(VENV)/.ready
