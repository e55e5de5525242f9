# `make run` and `make test` do all the set-up themselves.
VENV := .venv
BIN := $(VENV)/bin
SCENARIO := scenarios/flights
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: run test lint types imports check bench docs vectors fuzz chaos clean sandbox
run: $(VENV)/ready sandbox
	$(BIN)/mpc run $(SCENARIO)

test: $(VENV)/ready sandbox
	$(BIN)/python -m pytest

check: lint types imports

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

imports: $(VENV)/ready
	$(BIN)/lint-imports

bench: $(VENV)/ready sandbox
	$(BIN)/python -m bench

# The long version of what `make test` attacks for some minutes. `pip install atheris` into $(VENV), and the parsers
# are attacked by coverage.
FUZZ_MINUTES := 10
fuzz: chaos
	$(BIN)/python -m mpc.fuzz.decoding --seconds 30
	$(BIN)/mpc fuzz --minutes $(FUZZ_MINUTES)
	$(BIN)/mpc fuzz --engine swarm --minutes $(FUZZ_MINUTES)
	$(BIN)/mpc explore --minutes $(FUZZ_MINUTES)

# Runs of real processes that are killed, stopped, cut off and out of disk; for every night.
CHAOS_RUNS := 200
chaos: $(VENV)/ready sandbox
	$(BIN)/python tests/chaos.py $(CHAOS_RUNS)

docs: $(VENV)/ready
	$(BIN)/python -m mpc.fuzz.diagram --write
	$(BIN)/python -c "from mpc.scenario import document; print(document(), end='')" >docs/SCENARIO.md

$(VENV)/ready: requirements.lock requirements-examples.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "enclave-mpc needs Python 3.11 or newer; on Debian: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python lacks its venv module; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-examples.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The sandbox of the local enclave: bubblewrap, and libseccomp, which nearly every system has.
sandbox:
	@command -v bwrap >/dev/null && exit 0; \
	if ! command -v apt-get >/dev/null; then echo "The sandbox is missing: install the package bubblewrap"; exit 1; fi; \
	if [ "$$(id -u)" = 0 ]; then as=; elif sudo -n true 2>/dev/null; then as=sudo; \
	else echo "The sandbox is missing: sudo apt-get install bubblewrap"; exit 1; fi; \
	echo "Installing bubblewrap, the sandbox of the local enclave"; \
	$$as apt-get install -qq -y bubblewrap >/dev/null 2>&1 || { $$as apt-get update -qq && $$as apt-get install -qq -y bubblewrap >/dev/null; }

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis
