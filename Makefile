# make demo    train a small model on an embedded data set, measure a grid of bit widths, write results.csv and two plots into runs/demo
# make sweep   the same grid as a sweep with the real W&B client on the embedded server (AGENTS=2 DATA=… CHECKPOINT=…)
# make test    the test suite
# make lint    ruff: rules and format
# make clean   deletes runs/: the demo, and the sweeps' tables and plots; the embedded server keeps its own in sweepserver-data/
PYTHON ?= python3
BIN := .venv/bin
AGENTS ?= 2
DATA ?= runs/demo/data
CHECKPOINT ?= runs/demo/mnv2_digits.safetensors

.PHONY: setup demo sweep test lint clean

setup: .venv/.installed

.venv/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps sweeps
	touch $@

runs/demo/mnv2_digits.safetensors: .venv/.installed
	$(BIN)/python train.py --dataset digits --data-dir runs/demo/data --width-mult 0.35 --batch-size 64 --epochs 12 \
	  --lr 0.05 --save-path $@ --resume

demo: runs/demo/mnv2_digits.safetensors
	$(BIN)/python test.py --checkpoint runs/demo/mnv2_digits.safetensors --data-dir runs/demo/data --again \
	  --weight-bits 8,6,4,2 --act-bits 8,6,4,2 --calib-batches 2 --output runs/demo/results.csv \
	  --plot runs/demo/parallel_coordinates.png

sweep: .venv/.installed $(filter runs/demo/%,$(CHECKPOINT))
	$(BIN)/python sweep.py --agents $(AGENTS) --data-dir $(DATA) --checkpoint $(CHECKPOINT)

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf runs
