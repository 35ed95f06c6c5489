# make demo, make test ...: each makes the environment it needs first, so a fresh clone works with one command.
#
# Without PYTHON, the environment is .venv, made by $(BASE_PYTHON). With PYTHON (make PYTHON=/path/to/python test, or
# exported), that interpreter is used as it is: nothing is installed into it.
BASE_PYTHON ?= python3
ifndef PYTHON
PY := .venv/bin/python
STAMP := .venv/.installed
else
PY := $(PYTHON)
STAMP :=
endif

# More arguments for the tool behind a target: make test ARGS="-k plan", make demo ARGS="--train 100"
ARGS ?=

.PHONY: help env demo test oldest check format bench scale

help:
	@echo "make env     environment in .venv"
	@echo "make demo    generated data, training, a report to look at"
	@echo "make test    all quick tests (ARGS=\"-k plan\" picks some)"
	@echo "make oldest  the same with the oldest releases that are supported, in .venv-oldest (BASE_PYTHON=python3.10)"
	@echo "make check   format, lint, types, layers"
	@echo "make format  let ruff mend what it can"
	@echo "make scale   one run in 1, 2 and 4 processes: equal or not, and how fast"
	@echo "make bench   published counts beside ours, experts against dense MLPs, BSR against full fine-tuning"

env: $(STAMP)

# The stamp is written last, so an installation that broke off is done again.
.venv/.installed: pyproject.toml setup.py
	$(BASE_PYTHON) -m venv .venv
	$(PY) -m pip install -e ".[dev]"
	@touch $@

demo: env
	$(PY) tools/demo.py $(ARGS)

# One thread a process: two workers with two threads each on two cores only get into each other's way.
test: env
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

oldest:
	$(BASE_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -e ".[dev]" -c tests/oldest.txt
	$(MAKE) PYTHON=.venv-oldest/bin/python test

check: env
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy m3bsr tools
	$(PY) -m pytest -q tests/test_layering.py

format: env
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: env
	$(PY) tools/reference.py
	$(PY) tools/bench_moe.py
	$(PY) tools/bench_attention.py
	$(PY) tools/bench.py

scale: env
	$(PY) tools/scale.py $(ARGS)
