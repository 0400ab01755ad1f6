# Everything runs in .venv. Where a CUDA build of torch is installed already, the environment uses that one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA := $(shell $(PYTHON) -c "import torch; print(torch.version.cuda or '')" 2>/dev/null)
ifneq ($(CUDA),)
VENV_OPTIONS := --system-site-packages
endif
# --no-compile: Python compiles what is imported, a small part of these packages, and half of the time is saved
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c $(VENV)/constraints.txt
export HF_HUB_OFFLINE ?= 1
unexport PYTHONDONTWRITEBYTECODE # else every process of the tests compiles the libraries anew, 20 seconds each

.PHONY: help quickstart install install-quickstart style quality test test-slow recipes models clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

quickstart: install-quickstart  ## install, train six agents on BBC News, say where the adapters are
	$(BIN)/decaf train recipes/quickstart.yaml --overwrite

$(VENV)/constraints.txt: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_OPTIONS) $(VENV)
	$(if $(CUDA),grep -v '^torch==' constraints.txt,cat constraints.txt) > $@

$(VENV)/test.done: $(VENV)/constraints.txt pyproject.toml
	$(INSTALL) -e '.[test]'
	touch $@

$(VENV)/quickstart.done: $(VENV)/constraints.txt pyproject.toml
	$(INSTALL) -e '.[quickstart]'
	touch $@

install: $(VENV)/test.done  ## the package and what its tests need

install-quickstart: $(VENV)/quickstart.done

style: install  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: install  ## the same, check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: install  ## the tests that CI runs
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-slow: install  ## the others
	$(BIN)/python -m pytest -q -n 2 -m slow

recipes: install  ## two steps of every recipe on a tiny model
	$(BIN)/python -m pytest -q tests/test_house.py -k recipe

models: install  ## docs/models.md, the table of model families, written anew
	$(BIN)/python -m tests.matrix --write docs/models.md

clean:  ## remove what the targets made, but not runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
