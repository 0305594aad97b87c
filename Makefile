# EC²Face. `make help` lists the targets. Needs make and python 3.11, 3.12 or 3.13; makes .venv.

PROFILE ?= mini
ONLY ?=
FORCE ?=
TRAIN ?=
SEEDS ?=
SWEEPS ?=
SET ?=
DATA ?=
OUT ?=
DEVICE ?= cpu
SIZE ?= 128
RANKS ?= $(if $(filter cuda,$(DEVICE)),1,2)
BUNDLE = --device $(DEVICE) $(if $(DATA),--data $(DATA) --out $(OUT) --size $(SIZE))

PYTHON := .venv/bin/python
ON_RANKS = $(PYTHON) -m torch.distributed.run --standalone --nproc-per-node $(RANKS)
STAMP := .venv/.up-to-date

# Spinning OpenMP threads slow small models down tenfold on shared cores.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
# Trust what the machine trusts, as pip does where it is configured so.
export UV_SYSTEM_CERTS := 1

.DEFAULT_GOAL := help
.PHONY: help setup reproduce gallery publish test lab foundation lint clean

help:
	@echo "make setup       make .venv from requirements.lock"
	@echo "make reproduce   every figure and table, into runs/PROFILE/figures, compared with figures/PROFILE:"
	@echo "                 PROFILE=mini|smoke|paper ONLY=\"06 07\" FORCE=1 TRAIN=1 SEEDS=3 SWEEPS=1"
	@echo "                 SET=\"sampling.num_processes=4 trainer.num_processes=4\" overrides settings"
	@echo "make gallery     the executed notebooks as pages, into docs/gallery"
	@echo "make publish     figures/PROFILE, docs/gallery and the numbers in the pages from a run of one commit"
	@echo "make test        every test: first the fast ones (minutes), then those that train, launch"
	@echo "                 processes or run all notebooks in PROFILE=smoke"
	@echo "make lab         JupyterLab on the notebooks"
	@echo "make foundation  retrain the bundle data/mini128 from nothing (a day on two cores,"
	@echo "                 ten minutes of a GPU with DEVICE=cuda);"
	@echo "                 RANKS=2 processes share a step on the CPU;"
	@echo "                 DATA=ROOT OUT=DIR SIZE=64 trains one on the faces of a folder instead"
	@echo "make lint        ruff check and format; mypy on ec2face_core"
	@echo "make clean       remove .venv, runs/, data/cache and caches (never data/raw)"

setup: $(STAMP)

# A python found on the path may be a shim that cannot start, so each is asked for its version.
# Pip serves for uv alone, whose downloads do not depend on pip's configuration.
$(STAMP): requirements.lock pyproject.toml
	@set -e; \
	if ! .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	  for python in python3.11 python3.12 python3.13 python3; do \
	    if $$python -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	      found=$$python; break; \
	    fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then echo "make setup: needs python 3.11, 3.12 or 3.13 on the path" >&2; exit 1; fi; \
	  echo "make setup: .venv with $$($$found --version)"; \
	  $$found -m venv --clear .venv; \
	fi
	$(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	$(PYTHON) -m uv pip install --quiet --python $(PYTHON) -r requirements.lock
	$(PYTHON) -m uv pip install --quiet --python $(PYTHON) --no-deps -e .
	@touch $@

reproduce: $(STAMP)
	exec env EC2FACE_END_WITH_PARENT=1 $(PYTHON) -m ec2face_lab reproduce --profile $(PROFILE) $(if $(ONLY),--only $(ONLY)) \
	  $(if $(FORCE),--force) $(if $(TRAIN),--train) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SWEEPS),--sweeps) \
	  $(foreach setting,$(SET),--set $(setting))

gallery: $(STAMP)
	$(PYTHON) -m ec2face_lab gallery --profile $(PROFILE) $(if $(ONLY),--only $(ONLY))

publish: $(STAMP)
	$(PYTHON) -m ec2face_lab publish --profile $(PROFILE)

test: $(STAMP)
	@status=0; \
	$(PYTHON) -m pytest -m "not slow" || status=$$?; \
	$(PYTHON) -m pytest -m slow || status=$$?; \
	exit $$status

lab: $(STAMP)
	$(PYTHON) -m jupyterlab notebooks

foundation: $(STAMP)
	for kind in parser clip; do for role in guiding scoring; do \
	  $(PYTHON) -m ec2face_lab pretrain $$kind --role $$role $(BUNDLE) || exit; done; done
	$(PYTHON) -m ec2face_lab pretrain facts $(BUNDLE)
	$(ON_RANKS) -m ec2face_lab pretrain vae $(BUNDLE)
	$(PYTHON) -m ec2face_lab pretrain captions --processes 2 $(BUNDLE)
	$(ON_RANKS) -m ec2face_lab pretrain latents $(BUNDLE)
	$(ON_RANKS) -m ec2face_lab pretrain flux $(BUNDLE)
	$(ON_RANKS) -m ec2face_lab pretrain distill $(BUNDLE)
	$(if $(DATA),,$(PYTHON) -m ec2face_lab pretrain gates --device $(DEVICE))

lint: $(STAMP)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

clean:
	rm -rf .venv runs data/cache .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find ec2face_core ec2face_lab tests benchmarks notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
