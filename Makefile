# make demo    set up and run the project's main job on images it makes itself
# make test    set up what tests need and run them
# make test-d2 DETECTRON2=CHECKOUT    the same for d2, with a checkout of Detectron2
# make lint    the checks of style
# make bench   compare speed and memory with plain formulations, on a CPU; some minutes
# make clean   remove .venv and runs/, with all that was trained
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test test-d2 lint bench clean

demo: $(VENV)/.plots
	BIN=$(BIN) bash scripts/demo.sh

test: $(VENV)/.test
	$(BIN)/python -m pytest $(TESTS)

test-d2: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -r d2/requirements.txt
	PYTHONPATH=$(DETECTRON2) $(BIN)/python -m pytest tests/test_d2.py

lint: $(VENV)/.test
	$(BIN)/ruff check .

bench: $(VENV)/.plots
	$(BIN)/python benchmarks/run.py --rounds 5

# A stamp per set of packages: installed again when pyproject.toml changes.
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf .venv runs *.egg-info
