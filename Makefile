# Everything sets itself up from nothing: a virtual environment with the tested pins, then the command.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PIPELINE := $(BIN)/pipeline
TARGET := data/tiny-qwen3
CACHE := build/hs_cache
METHODS := dflash domino dspark

# The steps of the demo's recipe, about 150 s a method on two cores, and up to ten times as many.
BUDGETS := 600 2000 6000
SEEDS := 0 1 2
# What drafts learn from, at the demo's steps; of DSpark what is published, labels alone, and the best of the others.
OBJECTIVES := $(foreach method,dflash domino,$(addprefix $(method).,ce ce+dpace kl tv lk-alpha lk-hybrid)) \
  $(addprefix dspark.,ce dspark lk-hybrid kl)
RESULT_PROMPTS := 160

.PHONY: install demo test lint results objectives bench paired clean

install: .venv/installed

# torch first, by its pin: nothing after it may then bring another build.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The whole truth in minutes, without a GPU or a network: plan, cache, verify, train, decode, one table. Drafts this small
# gain nothing from a second thread, so two methods train at once, with one each.
demo: install
	$(PIPELINE) plan --model $(TARGET) --out $(CACHE)
	$(PIPELINE) cache-hidden --model $(TARGET) --out $(CACHE)
	$(PIPELINE) verify $(CACHE)
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs 2 $(METHODS:%=demo-%)
	$(PIPELINE) report $(METHODS:%=build/demo/%.json)

# Ctrl-C is for the command, whose last words sed still passes on.
demo-%: named = 2>&1 | (trap '' INT TERM; sed -u 's/^/$*: /')
demo-%: install
	$(PIPELINE) train-draft configs/demo.toml --set draft.method=$* --cache $(CACHE) --out build/demo/$* $(named)
	$(PIPELINE) evaluate --draft build/demo/$* --out build/demo/$*.json $(named)

# Tests in two processes of one thread each; those of what matters most come first.
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hours, in the background: every method, seed and budget, two runs at a time, each resumable; then the README's table.
RUNS := $(foreach steps,$(BUDGETS),$(foreach seed,$(SEEDS),$(METHODS:%=build/results/%-$(steps)-$(seed).json)))

results: install
	$(PIPELINE) cache-hidden --model $(TARGET) --out $(CACHE)
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 $(RUNS)
	$(PIPELINE) report --markdown --forced $(RUNS)

# The same for the objectives, greedy and drawn: `objectives` after `results`, or alone.
LESSONS := $(foreach seed,$(SEEDS),$(OBJECTIVES:%=build/objectives/%.$(seed).json))

objectives: install
	$(PIPELINE) cache-hidden --model $(TARGET) --out $(CACHE)
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 $(LESSONS)
	$(PIPELINE) report --markdown $(LESSONS)

build/objectives/%.json: run = $(subst ., ,$*)
build/objectives/%.json: dpace = $(if $(findstring +dpace,$*),--set draft.weighting=dpace)
build/objectives/%.json:
	$(PIPELINE) train-draft configs/demo.toml --set draft.method=$(word 1,$(run)) \
	  --set draft.objective=$(subst +dpace,,$(word 2,$(run))) $(dpace) --set train.seed=$(word 3,$(run)) \
	  --cache $(CACHE) --out build/objectives/$*
	$(PIPELINE) evaluate --draft build/objectives/$* --count $(RESULT_PROMPTS) --temperature 1 --out $@

build/results/%.json: run = $(subst -, ,$*)
build/results/%.json:
	$(PIPELINE) train-draft configs/demo.toml --set draft.method=$(word 1,$(run)) --set train.steps=$(word 2,$(run)) \
	  --set train.seed=$(word 3,$(run)) --cache $(CACHE) --out build/results/$*
	$(PIPELINE) evaluate --draft build/results/$* --count $(RESULT_PROMPTS) --out $@

# Minutes, on a machine that does nothing else: reading, codecs and capturing, each beside its reference.
bench: install
	for part in read codecs capture; do $(BIN)/python tests/bench/$$part.py || exit 1; done

# An hour, resumable: whether drafts learn from recoded states what they learn from the states themselves.
paired: install
	$(BIN)/python tests/bench/paired.py

clean:
	rm -rf build
