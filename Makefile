# Two commands from a fresh clone, with nothing installed but Python 3.11 or newer and
# pip: `make demo` runs the main job, `make test` the tests. Each makes what it needs.

VENV ?= .venv
BIN := $(VENV)/bin
# A command that exists may still not run (shims of version managers), so it is tried.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

DEMO_DIR ?= runs/digits
# Test processes: XLA compiles on one core, so two keep a two-core machine busy.
WORKERS ?= 2
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-others notebooks lint format proofs bench bench-peers parity constraints clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' \
		$(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.demo-installed  ## Distil handwritten digits, five seeds, and write the report
	$(BIN)/distilljax train configs/digits/teacher.py --workdir $(DEMO_DIR)/teacher
	$(BIN)/distilljax train configs/digits/few_labels.py --workdir $(DEMO_DIR)/few_labels --seeds 0..4 --teacher.workdir $(DEMO_DIR)/teacher
	$(BIN)/distilljax train configs/digits/missing_class.py --workdir $(DEMO_DIR)/missing_class --seeds 0..4 --teacher.workdir $(DEMO_DIR)/teacher
	$(BIN)/distilljax train configs/digits/all_data.py --workdir $(DEMO_DIR)/all_data --seeds 0..4 --teacher.workdir $(DEMO_DIR)/teacher
	$(BIN)/distilljax report $(DEMO_DIR)

test: $(VENV)/.test-installed  ## Run the tests (some 20 minutes on two cores)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.test-installed  ## Run those of whole command lines and several processes (10 more)
	$(PYTEST) -m slow $(ARGS)

test-others: $(VENV)-trackers/.installed $(VENV)-torch/.installed $(VENV)-tunix/.installed  ## Run those with W&B, trackio, transformers and Tunix
	JAX_PLATFORMS=cpu $(VENV)-trackers/bin/python -m pytest tests/trackers_real_test.py $(ARGS)
	JAX_PLATFORMS=cpu $(VENV)-torch/bin/python -m pytest tests/models/pretrained -k transformers_reads $(ARGS)
	JAX_PLATFORMS=cpu $(VENV)-tunix/bin/python -m pytest tests/other_models_test.py -k tunix $(ARGS)

notebooks: $(VENV)/.test-installed  ## Execute the notebooks
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --nbmake notebooks/*.ipynb

lint: $(VENV)/.test-installed  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test-installed  ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proofs: $(VENV)/.demo-installed  ## Rerun the published experiments (hours, and 217 MB of data)
	scripts/fetch_assets.sh assets
	$(BIN)/python benchmarks/proofs.py

bench: $(VENV)/.test-installed  ## Run all benchmarks, and write docs/benchmarks.md (hours; QUICK=1: minutes)
	$(BIN)/python benchmarks/bench.py $(if $(QUICK),--quick) \
		--peers $(VENV)-bench-peers --tunix $(VENV)-bench-tunix

bench-peers: $(VENV)-bench-peers/.installed $(VENV)-bench-tunix/.installed  ## Install what the benchmarks compare with (gigabytes)

parity: $(VENV)/.demo-installed  ## Compare the losses with those of torch, torchdistill and TRL
	$(BIN)/python benchmarks/parity.py --env $(VENV)-peers

# An installation counts as done when its stamp is written, last of all: one that was
# interrupted is taken up again, and one whose pins have changed is brought up to date.
PINS := pyproject.toml constraints/py311.txt constraints/py312.txt

$(VENV)/.demo-installed: $(PINS)
	$(call install,train$(comma)report)
	@touch $@

$(VENV)/.test-installed: $(PINS)
	$(call install,train$(comma)report$(comma)text$(comma)llm$(comma)quant$(comma)plan$(comma)test)
	@touch $@ $(VENV)/.demo-installed

# The other packages of the benchmarks, in the versions that were compared; Tunix with the
# JAX and Flax of here.
OURS := $$($(BIN)/python -m pip freeze | grep -E '^(jax|jaxlib|flax|optax|numpy)==')
$(VENV)-bench-peers/.installed: PACKAGES = torch==2.13.0 liger-kernel==0.8.5 trl==1.16.0
$(VENV)-bench-tunix/.installed: PACKAGES = google-tunix==0.1.7 $(OURS)

$(VENV)-bench-%/.installed: $(VENV)/.test-installed
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet $(PACKAGES)
	@touch $@

# Others that ours work with, in the versions that were tested, each with all of our pins
# but those that it cannot have: trackio wants an older Pillow, Tunix older safetensors.
$(VENV)-trackers/.installed: PACKAGES = wandb==0.31.0 trackio==0.43.0 -e ".[train,wandb,trackio]"
$(VENV)-trackers/.installed: UNPINNED = pillow
$(VENV)-torch/.installed: PACKAGES = torch==2.13.0 transformers==5.24.0 -e ".[train,llm,text]"
$(VENV)-torch/.installed: UNPINNED = none
$(VENV)-tunix/.installed: PACKAGES = google-tunix==0.1.7 equinox -e ".[train,llm,tunix]"
$(VENV)-tunix/.installed: UNPINNED = safetensors|tokenizers|huggingface_hub|hf-xet

$(VENV)-trackers/.installed $(VENV)-torch/.installed $(VENV)-tunix/.installed: $(VENV)/.test-installed
	$(BIN)/python -m venv --clear --without-pip $(@D)
	grep -vE '^($(UNPINNED))==' "constraints/$$($(BIN)/python -c $(pins))" > $(@D)/pins.txt
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet \
		-c $(@D)/pins.txt beartype hypothesis pytest $(PACKAGES)
	@touch $@

comma := ,

# Debian has venv without ensurepip unless python3-venv is installed; there, the
# machine's own pip puts a pip into the environment.
define install
	@test -n "$(PYTHON)" || { \
		echo "distilljax needs Python 3.11 or newer, and found" \
			"$$(python3 --version 2>&1 || true). Install one, or name it:" \
			"make $(or $(firstword $(MAKECMDGOALS)),test) PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
		|| { $(PYTHON) -m venv --without-pip $(VENV) \
			&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(VENV) holds $$($(BIN)/python --version), and distilljax needs Python" \
			"3.11 or newer. Remove $(VENV) and run this again." >&2; \
		exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c "constraints/$$($(BIN)/python -c $(pins))" -e ".[$(1)]"
endef
pins := 'import sys; print("py311.txt" if sys.version_info < (3, 12) else "py312.txt")'

PYTHON311 ?= python3.11
# Name it where it is not on PATH.
PYTHON312 ?= python3.12

constraints:  ## Pin what the extras bring today, for both Pythons
	$(call freeze,$(PYTHON311),constraints/py311.txt)
	$(call freeze,$(PYTHON312),constraints/py312.txt)

# Only `name==version` may be written: a line with a path or an address would tie the
# pins to the machine that made them.
define freeze
	@set -eu; venv=$$(mktemp -d); trap 'rm -rf "$$venv"' EXIT; \
	$(1) -m venv "$$venv"; \
	"$$venv/bin/python" -m pip install --quiet ".[train,report,text,llm,quant,plan,test]"; \
	"$$venv/bin/python" -m pip freeze --exclude distilljax > "$$venv/pins.txt"; \
	if grep -vE '^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$$' "$$venv/pins.txt"; then \
		echo "$(2): these lines pin more than a version; left as it was." >&2; exit 1; \
	fi; \
	cp "$$venv/pins.txt" $(2); echo "wrote $(2)"
endef

clean:  ## Remove the environments and caches (never runs/)
	rm -rf .venv .venv-3.12 .venv-peers .venv-bench-* .venv-trackers .venv-torch .venv-tunix build .pytest_cache .ruff_cache
