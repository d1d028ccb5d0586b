# Few verbs, each one command. `make` alone lists them.
PYTHON := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cluster lint bench clean

help:  ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup:  ## make .venv with the locked CPU stack (quick when nothing changed)
	@bash requirements/setup.sh

demo: setup  ## train a tiny video model by Video-KTR on this machine; ends with the table
	.venv/bin/keytoken demo

test: setup  ## unit tests, then the tests that start the real stack
	$(PYTHON) -m pytest -m "not e2e and not gpu" --numprocesses=2 --dist=loadfile
	$(PYTHON) -m pytest -m "e2e and (hosts or not cluster)"

test-cluster: setup  ## hosts in network namespaces, and what happens when one is lost (root, 24 GiB, half an hour)
	$(PYTHON) -m pytest -m "cluster and not hosts" --numprocesses=2 --dist=loadfile

lint: setup  ## ruff (lint and format) and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: setup  ## steps and passes beside stock GRPO, and the kernels (on a CPU: their reference)
	.venv/bin/keytoken bench
	$(PYTHON) kernels/benchmarks/prefix.py --out outputs/bench
	$(PYTHON) kernels/benchmarks/gpu.py --out outputs/bench

clean:  ## remove caches and build products (not .venv, not runs)
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
	find recipe kernels configs tests -name __pycache__ -prune -exec rm -rf {} +
	find recipe kernels configs . -maxdepth 1 -name '*.egg-info' -prune -exec rm -rf {} +
