# Every target does all the set-up on a fresh machine, once: a virtual environment in .venv and the packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	@$(BIN)/ldm generate --n 2 --out out/demo --overwrite \
	  "a red heart, noto style" "grinning face, fluent 3d style" "pizza, twemoji style" \
	  "sunflower, fluent flat style" "locomotive, emojione style" "cat face, noto style" "automobile, fluent 3d style"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# a process for each core, of one thread each
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical

# about ten minutes; best on a machine that does nothing else
bench: $(VENV)/.installed
	$(BIN)/python -m training.bench
