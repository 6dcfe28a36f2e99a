# Each target sets up what it needs in .venv; `make demo` and `make test` are complete on a fresh machine with Python 3.10+.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-peers lint bench clean

demo: $(VENV)/demo.done
	$(RUN) tools/demo.py

test: $(VENV)/test.done
	$(RUN) -m pytest -n auto

# stock loaders judge our outputs: PyTorch, transformers and compressed-tensors, in an environment of their own;
# TORCH chooses the build, e.g. make test-peers TORCH=torch==2.13.0 PIP_EXTRA_INDEX_URL=...
TORCH ?= torch
test-peers: $(VENV)-peers/peers.done
	$(VENV)-peers/bin/python -m pytest -n auto tests/peers

$(VENV)-peers/peers.done: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet "$(TORCH)" --editable ".[peers]"
	touch $@

lint: $(VENV)/lint.done
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# on a machine with an NVIDIA GPU and CuPy, and PyTorch for the peers, in the Python that has them: make bench PYTHON=python3
bench:
	mkdir -p bench-out
	$(PYTHON) tools/bench.py --full --json bench-out/bench.json --plot bench-out/bench.png

clean:
	rm -rf $(VENV) $(VENV)-peers demo-out bench-out build *.egg-info

$(RUN):
	$(PYTHON) -m venv $(VENV)

# one stamp for each extra of setup.cfg: demo, test, lint
$(VENV)/%.done: setup.cfg pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet --editable ".[$*]"
	touch $@
