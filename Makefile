# Ballast. `make run` takes one turn of the loop; `make down` ends it. Ports: make run AIRFLOW_PORT=8081 MLFLOW_PORT=5001
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup run up down test test-e2e test-alerts test-compose test-chaos check bench-quality bench-train bench-drift
.PHONY: secrets compose-images compose-up compose-down compose-logs compose-upgrade compose-backup compose-restore compose-clean
.NOTPARALLEL:

unexport PYTHONDONTWRITEBYTECODE PYTHONSAFEPATH PYTHONPATH PYTHONHOME VIRTUAL_ENV
export GX_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

BIN := .venv/bin
# COMPOSE_FILES adds files to docker-compose.yml, such as -f gpu.yml; PROFILES adds parts of it: make compose-up PROFILES=monitoring
# What `make compose-up` was told holds for every compose- target until it is told otherwise.
SECRETS := deploy/secrets/stack.env
TOLD := deploy/secrets/compose.mk
-include $(TOLD)
COMPOSE := docker compose --env-file $(SECRETS) -f docker-compose.yml $(COMPOSE_FILES) $(foreach profile,$(PROFILES),--profile $(profile))
WORKERS ?= 1
# Only where there is a Prometheus to send them to.
export AIRFLOW_METRICS ?= $(if $(filter monitoring,$(PROFILES)),True,False)

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
	@$(BIN)/pytest -n 2 -m 'not e2e and not compose and not chaos'

test-e2e: setup ## The tests that start the real stack
	@$(BIN)/pytest -m e2e

test-alerts: setup ## Of those the way of an alert, with real Prometheus and Alertmanager: metric, rule, bridge, run
	@$(BIN)/pytest -m e2e tests/e2e/test_alerts.py

test-compose: setup ## The tests that build the images and start the Compose stack; they need a Docker engine
	@$(BIN)/pytest -m compose -s

test-chaos: setup ## Kill -9 of everything in every step, a full disk, S3 away, a jumping clock: make test-chaos CHAOS_CELLS=18
	@CHAOS_CELLS=$(CHAOS_CELLS) CHAOS_SEED=$(CHAOS_SEED) CHAOS_REPORT=$(CHAOS_REPORT) $(BIN)/pytest -m chaos -s $(CHAOS_TESTS)

# What the tests and the docs make up: passwords of nobody, and the hashes of old state stores.
MADE_UP := ^(hunter2|secret|secret-of-[a-z]+|chaos|key\.pem|a word|a%20word|p%40ssword|password|s3cr.*w(@|%40)rd|https://hooks.slack.com/services/T…/B…/…)$$

check: setup ## Format, lint, types, who may import whom, and whether a secret is in the tree
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/hadolint Dockerfile
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --cores 2 --no-verify --exclude-files '^uv\.lock$$|\.(png|sql)$$' \
		--exclude-secrets '$(MADE_UP)'

bench-quality: setup ## What the model is worth: the challenger of each month, April to December 2013, on that month
	@$(BIN)/python -m benchmarks.quality

bench-train: setup ## What a training step costs, and how long training takes to be as good as the baselines
	@$(BIN)/python -m benchmarks.train

bench-drift: setup ## How often the monitor raises for nothing, and how small a shift it finds, beside Evidently's preset
	@$(BIN)/python -m benchmarks.drift

secrets: ## Make the secrets of the Compose stack, in deploy/secrets; what is there stays
	@python3 scripts/make_secrets.py

compose-images: secrets ## Build the two images of the Compose stack from the commit that is checked out
	@git bundle create --quiet deploy/project.bundle HEAD
	@BALLAST_COMMIT=$$(git rev-parse HEAD) $(COMPOSE) build airflow-init project

compose-up: compose-images ## Start the Compose stack: make compose-up WORKERS=2 PROFILES=monitoring
	@printf '%s ?= %s\n' WORKERS '$(WORKERS)' PROFILES '$(PROFILES)' COMPOSE_FILES '$(COMPOSE_FILES)' >$(TOLD).part
	@mv $(TOLD).part $(TOLD)
	@$(COMPOSE) up --detach --no-build --scale worker=$(WORKERS)
	@sh scripts/compose_wait.sh $(COMPOSE)

compose-down: ## Stop the Compose stack; its volumes stay
	@$(COMPOSE) --profile '*' down

compose-logs: ## Follow what the services of the Compose stack say
	@$(COMPOSE) logs --follow --tail=100

compose-upgrade: compose-images ## Bring the Compose stack to the commit that is checked out, after a backup
	@$(MAKE) --no-print-directory compose-backup
	@$(COMPOSE) --profile '*' stop $$($(COMPOSE) --profile '*' config --services | grep -vxE 'postgres|redis|s3|s3-data')
	@$(MAKE) --no-print-directory compose-up

compose-backup: ## Back the running Compose stack up: databases, artifacts, ledger, data (BACKUP names the folder)
	@sh scripts/compose_backup.sh "$(or $(BACKUP),backups/$(shell date -u +%Y%m%dT%H%M%SZ))" $(COMPOSE)

compose-clean: ## Remove logs and rows of Airflow that are older than DAYS (90)
	@sh scripts/compose_clean.sh "$(or $(DAYS),90)" $(COMPOSE)

compose-restore: ## Put the Compose stack back as a backup has it: make compose-restore BACKUP=backups/20260101T000000Z
	@sh scripts/compose_restore.sh "$(BACKUP)" $(COMPOSE)
