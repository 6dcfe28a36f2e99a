# Each target sets up what it needs in .venv; `make demo` and `make test` are complete on a fresh machine with Python 3.10+.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/demo.done
	$(RUN) tools/demo.py

test: $(VENV)/test.done
	$(RUN) -m pytest -n auto

lint: $(VENV)/lint.done
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) demo-out build *.egg-info

$(RUN):
	$(PYTHON) -m venv $(VENV)

# one stamp for each extra of setup.cfg: demo, test, lint
$(VENV)/%.done: setup.cfg pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@
