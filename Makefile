# Two commands on a fresh machine: `make repro` runs the whole workflow, `make test` runs the tests.
# Both first create .venv from requirements.lock; that step is skipped while the lock is unchanged.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps
# As large as all the rest: pip unpacks one file at a time, so two of it run.
LARGE := ^(torch|nvidia|triton)
READY := .venv/installed-$(shell cat requirements.lock pyproject.toml | cksum | tr ' ' '-')
export PATH := $(BIN):$(PATH)
export RAY_USAGE_STATS_ENABLED := 0
export DVC_NO_ANALYTICS := 1

.PHONY: repro test setup
repro: setup
	python -m pipeline.params
	dvc repro

test: setup
	python -m pytest -n auto --maxprocesses 4

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: set PYTHON=/path/to/python3.11")'
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" .venv && \
	  VIRTUAL_ENV=.venv uv pip install --quiet --no-deps -r requirements.lock && \
	  VIRTUAL_ENV=.venv uv pip install --quiet --no-deps --no-build-isolation -e . ; \
	else \
	  $(PYTHON) -m venv .venv && \
	  grep -E '$(LARGE)' requirements.lock > .venv/large.txt && grep -vE '$(LARGE)' requirements.lock > .venv/rest.txt && \
	  printf '%s\n' large rest | xargs -P 2 -I {} $(PIP) --no-compile -r .venv/{}.txt && \
	  $(PIP) --no-build-isolation -e . ; \
	fi
	@rm -f .venv/installed-* && touch $@
