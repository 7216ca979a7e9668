# toolfleet: `make demo` shows everything, `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin

# `make demo ARGS=...`, `make up ARGS='--port 9000'`, `make test ARGS='-k discovery'`
ARGS ?=

PIP_INSTALL := -m pip install --quiet --quiet --disable-pip-version-check --no-input
INSTALLED := $(VENV)/.requirements-installed
READY := $(VENV)/.project-installed
PEERS_READY := $(PEERS)/.requirements-installed
TYPING_LINK := .typing/toolfleet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo up test check format bench bench-flood bench-streams docs lock peers consul faketime powercut chaos clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 24

setup: $(READY) $(TYPING_LINK) ## .venv from the lock file, with this project in it

demo: setup ## starts everything, runs a job of four web crawls, stops everything
	@$(BIN)/toolfleet demo $(ARGS)

up: setup ## starts everything and leaves it running on port 8081 until Ctrl-C
	@$(BIN)/toolfleet up $(ARGS)

# Two processes, by file: the tests mostly wait for real servers. `make test TEST_PROCESSES=0` runs them in one.
TEST_PROCESSES ?= 2

test: setup peers ## all tests, against real servers; installs Consul and libfaketime where root may
	@command -v consul >/dev/null || [ "$$(id -u)" != 0 ] || deployment/ci/install_consul.sh
	@ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] || deployment/ci/install_faketime.sh
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile $(ARGS)

check: setup ## formatting, lint, types, import direction
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo

format: setup ## formats and applies the safe fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup ## writes docs/SETTINGS.md again from the settings
	@$(BIN)/python -m tests.support.settings_doc > docs/SETTINGS.md

# `make chaos SEED=7 JOBS=10000 SECONDS=600`; more with ARGS, see `python -m tests.chaos --help`
SEED ?= 1
JOBS ?= 500
SECONDS ?= 60

chaos: setup ## the whole fleet under faults, audited; SEED, JOBS, SECONDS; one JSON object on the last line
	@$(BIN)/python -m tests.chaos --seed $(SEED) --jobs $(JOBS) --seconds $(SECONDS) $(ARGS)

bench: setup ## throughput and latency; one JSON object on the last line
	@$(BIN)/python -m benchmarks $(ARGS)

bench-flood: setup ## what a job that floods with progress costs the others, over stdio and HTTP
	@$(BIN)/python -m benchmarks.flood $(ARGS)

bench-streams: setup ## stream clients that lose their connections, and 2,000 idle ones
	@$(BIN)/python -m benchmarks.streams $(ARGS)

# The hashes cover every platform's artifacts, so one lock serves them all. Pins that still fit are kept;
# `make lock ARGS=--upgrade` takes the newest releases.
COMPILE := $(BIN)/uv pip compile --quiet --generate-hashes --universal --python-version 3.11 \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

lock: setup ## writes the lock files again from pyproject.toml
	@$(COMPILE) $(ARGS) --extra embedded --extra dev pyproject.toml -o requirements.lock
	@$(COMPILE) $(ARGS) --extra embedded --constraint requirements.lock pyproject.toml -o requirements-runtime.lock
	@$(COMPILE) $(ARGS) --group peers -o requirements-peers.lock

peers: $(PEERS_READY) ## MCP servers that others wrote, in an environment of their own, for the tests

powercut: setup ## root: a power cut under load, with our settings of the servers and with their own; figures, then JSON
	@$(BIN)/python -m tests.powercut $(ARGS)

consul: ## Consul where it is missing (Debian, root)
	@deployment/ci/install_consul.sh

faketime: ## libfaketime where it is missing (Debian, root); tests move clocks with it
	@deployment/ci/install_faketime.sh

clean: ## removes what the targets above made
	rm -rf $(VENV) $(PEERS) .typing .run build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.lock
	@echo "setup: making $(VENV) from requirements.lock"
	@deployment/ci/make_venv.sh '$(PYTHON)' $(VENV)
	@$(BIN)/python $(PIP_INSTALL) --require-hashes -r requirements.lock
	@touch $@

# Editable, so that the source tree is what runs; without dependencies, since the lock has installed them.
$(READY): pyproject.toml $(INSTALLED)
	@$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

# mypy and ruff know no `package-dir`: this link is where they find the package under its import name.
$(TYPING_LINK):
	@mkdir -p $(@D)
	@ln -sfn ../src $@

$(PEERS_READY): requirements-peers.lock
	@echo "setup: making $(PEERS) from requirements-peers.lock"
	@deployment/ci/make_venv.sh '$(PYTHON)' $(PEERS)
	@$(PEERS)/bin/python $(PIP_INSTALL) --require-hashes -r requirements-peers.lock
	@touch $@
