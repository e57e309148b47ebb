# make demo    set up and run the project's main job on images it makes itself
# make test    set up what tests need and run them
# make lint    the checks of style
# make bench   compare speed and memory with plain formulations, on a CPU; some minutes
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.plots
	BIN=$(BIN) bash scripts/demo.sh

test: $(VENV)/.test
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/.test
	$(BIN)/ruff check .

bench: $(VENV)/.plots
	$(BIN)/python benchmarks/run.py

# A stamp per set of packages: installed again when pyproject.toml changes.
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf .venv runs *.egg-info
