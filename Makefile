# Every verb sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := out/demo

.PHONY: setup demo test check bench docs clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# pytorch-grad-cam asks for opencv-python, which would overwrite the headless one; without it all it needs is here.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt grad-cam ttach
	@touch $@

demo: setup
	$(BIN)/sightline evaluate examples/demo.toml --out $(OUT)
	$(BIN)/sightline report $(OUT) --out $(OUT)/report.html --title 'sightline on creatures'
	@echo 'open $(OUT)/report.html'

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright

bench: setup
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/metrics.py

docs: setup
	$(BIN)/python docs/make.py

clean:
	rm -rf $(VENV) out
