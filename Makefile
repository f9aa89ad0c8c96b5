# Ballast. `make run` takes one turn of the loop; `make down` ends it. Ports: make run AIRFLOW_PORT=8081 MLFLOW_PORT=5001
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup run up down test test-e2e test-alerts check bench-quality bench-train bench-drift
.NOTPARALLEL:

unexport PYTHONDONTWRITEBYTECODE PYTHONSAFEPATH PYTHONPATH PYTHONHOME VIRTUAL_ENV
export GX_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

BIN := .venv/bin

help: ## This list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

setup: ## Install the locked environment into .venv (every other target does it first)
	@sh scripts/setup.sh

run: ## Start Airflow and MLflow, and take one turn of the loop: train, gate, promote, monitor, retrain
	@echo 'Ballast · one turn of the loop on New York flights, 2013'
	@sh scripts/setup.sh
	@$(BIN)/python -m pipelines.stack up
	@$(BIN)/python -m pipelines.turn

up: setup ## Start Airflow and MLflow, and nothing else
	@$(BIN)/python -m pipelines.stack up

down: ## Stop everything that `make run` started
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m pipelines.stack down; else echo 'nothing was running'; fi

test: setup ## The test suite
	@$(BIN)/pytest -n 2 -m 'not e2e'

test-e2e: setup ## The tests that start the real stack
	@$(BIN)/pytest -m e2e

test-alerts: setup ## Of those the way of an alert, with real Prometheus and Alertmanager: metric, rule, bridge, run
	@$(BIN)/pytest -m e2e tests/e2e/test_alerts.py

check: setup ## Format, lint, types, and who may import whom
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench-quality: setup ## What the model is worth: the challenger of each month, April to December 2013, on that month
	@$(BIN)/python -m benchmarks.quality

bench-train: setup ## What a training step costs, and how long training takes to be as good as the baselines
	@$(BIN)/python -m benchmarks.train

bench-drift: setup ## How often the monitor raises for nothing, and how small a shift it finds, beside Evidently's preset
	@$(BIN)/python -m benchmarks.drift
