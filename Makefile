# The entry points. Each installs what it needs into .venv. PYTHON selects the interpreter (3.11 or
# newer).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-fast check bench clean upgrade

demo: .venv/base  ## draw shards, encode them, verify the result
	@test -d demo/shards || $(BIN)/latentcache demo-data demo/shards
	$(BIN)/latentcache run configs/demo.yaml
	$(BIN)/latentcache verify configs/demo.yaml
	$(BIN)/latentcache inspect configs/demo.yaml --rows 3
	@echo
	@echo 'The latents are in demo/latents. To load them:'
	@echo
	@echo '    import latentcache'
	@echo '    dataset = latentcache.open_dataset("demo/latents")'
	@echo '    row = dataset[0]   # row.latent, row.key, row.caption, …'
	@echo
	@echo 'To train a small model from them:'
	@echo
	@echo '    $(BIN)/python examples/train_dit.py demo/latents --out demo/dit --vae demo'

test: .venv/dev  ## run the tests
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-fast: .venv/dev  ## run the quick tests that start no server and no Ray cluster
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not system and not slow'

check: .venv/dev  ## lint, format, types, prose
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python scripts/check_prose.py

bench: .venv/dev  ## measure, print tables, write bench/results/
	$(BIN)/python bench/decode.py
	$(BIN)/python bench/encoder.py
	$(BIN)/python bench/run.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/driver.py
	$(BIN)/python bench/scale.py
	$(BIN)/python bench/qa.py
	$(BIN)/python bench/loader.py

clean:
	rm -rf .venv demo dist bench/.envs bench/.data .mypy_cache .pytest_cache .ruff_cache

upgrade: .venv/dev  ## install the newest versions that pyproject.toml allows, and pin them
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	{ sed '/^[^#]/d' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable; } > constraints.new
	sed 's/+cpu$$//' constraints.new > constraints.txt && rm constraints.new

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit("latentcache needs Python 3.11 or newer: make PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/base: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

.venv/dev: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/base
