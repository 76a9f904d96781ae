# python3.11 where it runs (a pyenv shim may stand there and not), else python3.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
python := .venv/bin/python
extras := dev,envs,verify,agents,verifiers

.PHONY: help demo test parity nightly mutants lint bench tables notebook notebooks docs clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Stamps are touched last: an interrupted install is taken up again by the next make. `envs` is empty but on Python 3.11.
.venv/.demo: setup.py
	$(PYTHON) -m venv .venv
	@echo "installing jax, flax, optax, orbax and transformers into .venv: a minute or two"
	$(python) -m pip install --quiet -e .
	@touch $@

.venv/.dev: .venv/.demo
	$(python) -m pip install -e '.[$(extras)]'
	@touch $@

.venv/.parity: .venv/.dev
	$(python) -m pip install -e '.[$(extras),parity]'
	@touch $@

.venv/.notebooks: .venv/.dev
	$(python) -m pip install -e '.[$(extras),notebooks]'
	@touch $@

.venv/.docs: .venv/.dev
	$(python) -m pip install -e '.[docs]'
	@touch $@

demo: .venv/.demo  ## teach a tiny language model to add, on this CPU
	$(python) experiments/arithmetic_grpo.py

test: .venv/.dev  ## every test that needs neither torch nor the network, in two processes
	$(python) -m pytest -n 2 --dist worksteal

parity: .venv/.parity  ## compare with torch and transformers (installs torch)
	$(python) -m pytest -m parity

nightly: .venv/.dev  ## the long tests, and those of make test in programs that XLA optimizes
	$(python) -m pytest -m nightly
	XLA_FLAGS= $(python) -m pytest -n 2 --dist worksteal

mutants: .venv/.dev  ## put known bugs into a copy of this code, one at a time, and see that a test notices each
	$(python) -m tests.mutants.run

lint: .venv/.dev  ## ruff, shellcheck, and the schemas of CI workflow, issue forms, citation and of what launches runs
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(python) -m check_jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/method.yml
	$(python) -m check_jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(python) -m check_jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(python) -m check_jsonschema --schemafile tests/launch/jobset.schema.json experiments/launch/gke_jobset.yaml
	$(python) -m check_jsonschema --schemafile tests/launch/skypilot.schema.json experiments/launch/skypilot.yaml
	.venv/bin/shellcheck experiments/launch/*.sh tests/launch/fake_srun

# What runs, by name: the other files there are parts of these.
benchmarks := shares rollout train_step grpo_step returns control memory packing batch_invariant startup reward_pool cost conversations sandbox

bench: .venv/.dev  ## run every benchmark, and write the table in docs/performance.md
	@set -e; folder=$$(mktemp -d); trap 'rm -rf $$folder' EXIT; for name in $(benchmarks); do \
	  echo "== $$name"; $(python) experiments/benchmarks/$$name.py --json $$folder/$$name.json; \
	done; \
	for name in shares rollout train_step grpo_step; do \
	  echo "== $$name, W2"; $(python) experiments/benchmarks/$$name.py --preset W2 --json $$folder/$$name-W2.json; \
	done; \
	$(python) experiments/benchmarks/write_table.py $$folder

tables: .venv/.dev  ## write docs/algorithms.md, docs/taxonomy.md and docs/estimators.md again
	$(python) -m tests.catalogue
	$(python) -m tests.taxonomy
	$(python) experiments/tables/estimators.py

notebook: .venv/.notebooks  ## open the first notebook in JupyterLab
	$(python) -m jupyterlab notebooks/01_change_the_loss.ipynb

notebooks: .venv/.notebooks  ## run every notebook from its first cell to its last, and write its outputs into its file
	$(python) -m tests.notebooks

docs: .venv/.docs  ## the site from docs/ and the docstrings, build/docs/index.html; a warning is an error
	$(python) -m sphinx -W --keep-going -E -q docs build/docs

clean:  ## delete caches and build outputs; .venv and runs stay
	rm -rf build dist docs/api *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
