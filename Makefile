# Each target sets up what it needs in .venv; `make demo` and `make test` are complete on a fresh machine with Python 3.10+.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint fuzz bench clean

demo: $(VENV)/demo.done
	$(RUN) tools/demo.py

test: $(VENV)/test.done
	$(RUN) -m pytest -n auto

lint: $(VENV)/lint.done
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# files nobody meant, for SECONDS; a finding is printed with the command that repeats it
SECONDS ?= 60
fuzz: $(VENV)/test.done
	$(RUN) tests/fuzz.py --seconds $(SECONDS)

# on a machine with an NVIDIA GPU and CuPy, and PyTorch for the peers, in the Python that has them: make bench PYTHON=python3
bench:
	mkdir -p bench-out
	$(PYTHON) tools/bench.py --full --json bench-out/bench.json --plot bench-out/bench.png

clean:
	rm -rf $(VENV) demo-out bench-out build *.egg-info

$(RUN):
	$(PYTHON) -m venv $(VENV)

# one stamp for each extra of setup.cfg: demo, test, lint
$(VENV)/%.done: setup.cfg pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@
