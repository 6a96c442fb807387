# Each target sets up all it needs: a virtual environment in .venv with the pinned packages.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
CORES := $(shell getconf _NPROCESSORS_ONLN)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := python -m pip install --quiet --disable-pip-version-check

OLDEST := .venv-oldest

.PHONY: install demo test test-oldest check clean

install: $(READY)

demo: $(READY)
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) \
		train_scripts/dreambooth_lora.py --optimizer lora_muon --text_encoder_lr 0.02 --output_dir outputs/demo \
		--overwrite_output_dir
	$(BIN)/dreamlora compare --quick --optimizers adamw scaled_adamw --max_train_steps 120 --sample_steps 60 \
		--no_with_prior_preservation --output_dir outputs/demo-compare

test: $(READY)
	$(BIN)/python -m pytest -n 2

# The tests with the lowest versions that pyproject.toml allows; torch stays the pinned one.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n 2

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_architecture.py

# Only what constraints.txt pins: also what builds this package (setuptools), and no code of others that would build theirs.
# bitsandbytes lies apart, for the tests that ask for it (tests/conftest.py): PEFT imports it wherever it is, which takes
# every process two seconds.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --only-binary :all: -c constraints.txt torch setuptools
	$(BIN)/$(INSTALL) --only-binary :all: -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/$(INSTALL) --only-binary :all: -c constraints.txt --no-deps --target $(VENV)/optional bitsandbytes
	touch $@

$(OLDEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(PYTHON) tools/lower_bounds.py > $(OLDEST)/lower_bounds.txt
	$(OLDEST)/bin/$(INSTALL) -c $(OLDEST)/lower_bounds.txt torch setuptools
	$(OLDEST)/bin/$(INSTALL) -c $(OLDEST)/lower_bounds.txt --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache
