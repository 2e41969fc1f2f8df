# Everything here sets itself up: Python 3.11, make and a package registry are all it needs.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow test-cluster faults mutants lint format clean

demo: $(VENV)/installed
	$(RUN) train.py --run_name demo --init_weights weights/control.pt --n_epochs 1 --train_subset 2560 --lr 0.01 --regularizer L2Grad --lmbda 0.03 --no_test_penalty
	$(RUN) quant_inference.py demo.pt weights/*.pt --bits 2 3 4 8 --schemes uniform --test_subset 1000 --output demo
	@echo "next:    look at demo/accuracy.png, then train your own: the commands under Train in README.md"

test: lint
	$(RUN) -m pytest -n auto --dist worksteal

lint: $(VENV)/installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/installed-test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

test-slow: $(VENV)/installed-test
	$(RUN) -m pytest -m slow

test-cluster: $(VENV)/installed-test
	$(RUN) -m pip install --quiet --requirement requirements-cluster.txt
	$(RUN) -m pytest tests/analysis/test_study_cluster.py -m cluster

faults: $(VENV)/installed-test
	$(RUN) -m pytest -m faults -s

mutants: $(VENV)/installed-test
	$(RUN) -m pip install --quiet mutmut==3.8.1
	$(RUN) -m mutmut run
	$(RUN) -m mutmut results

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/installed-test: requirements-test.txt requirements-export.txt requirements-runtimes.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement requirements-test.txt
	touch $@

clean:
	rm -rf $(VENV)
