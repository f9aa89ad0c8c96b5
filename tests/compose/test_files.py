"""What Dockerfile, docker-compose.yml and the secrets' maker promise, as far as it shows without an engine."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PUBLISHED = {"api-server", "mlflow", "grafana"}
ONCE = {"airflow-init", "project", "storage-init", "mlflow-migrate", "mlflow-init", "bridge-init", "s3-data-init"}
sys.path.insert(0, str(ROOT / "scripts"))
from make_secrets import SECRETS, make  # noqa: E402


def test_ports_only_user_interfaces_published_on_loopback() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == PUBLISHED
    for name in PUBLISHED:
        assert all(port.startswith("${BALLAST_BIND:-127.0.0.1}:") for port in SERVICES[name]["ports"]), name
    started = {name for name in PUBLISHED if "profiles" not in SERVICES[name]}
    assert started == {"api-server", "mlflow"}


def test_networks_only_two_lead_out() -> None:
    inner = {name for name, network in COMPOSE["networks"].items() if network.get("internal")}
    assert set(COMPOSE["networks"]) - inner == {"edge", "outside"}
    for name in ("postgres", "redis", "s3", "s3-data", "git"):
        assert set(SERVICES[name]["networks"]) <= inner, name


def test_volumes_no_service_holds_the_engine() -> None:
    mounted = [str(volume) for service in SERVICES.values() for volume in service.get("volumes", [])]
    assert mounted
    assert not [volume for volume in mounted if "docker.sock" in volume or volume.startswith("/")]


def test_secrets_every_one_is_made_and_none_has_a_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    asked = set(re.findall(r"\$\{(\w*(?:PASSWORD|SECRET|KEY|TOKEN)\w*):\?run make secrets\}", text))
    named = set(re.findall(r"\$\{(\w*(?:PASSWORD|SECRET|KEY|TOKEN)\w*)", text))
    assert asked == named <= set(SECRETS)
    assert set(SECRETS) - asked == set()


@pytest.mark.parametrize("says", ["false", "true"])
def test_wait_that_cannot_ask_or_is_told_nothing_is_no_health(says: str) -> None:
    command = ["sh", "scripts/compose_wait.sh", says]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"COMPOSE_WAIT_S": "0"}, capture_output=True, check=False)
    assert done.returncode == 1


def test_backup_that_is_interrupted_lets_git_go_on_and_leaves_nothing(tmp_path: Path) -> None:
    compose = tmp_path / "compose"
    compose.write_text(f"""#!/bin/sh
echo "$@" >>{tmp_path}/said
case "$*" in
*"ps --quiet git") echo 1;;
*" /project") kill -TERM $PPID; sleep 1;;
esac
""")
    compose.chmod(0o755)
    command = ["sh", "scripts/compose_backup.sh", str(tmp_path / "backup"), str(compose)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 130
    assert (tmp_path / "said").read_text().splitlines()[-1] == "--profile travel unpause git"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compose", "said"]


def test_worker_holds_nothing_of_airflow_s_database() -> None:
    held = SERVICES["worker"]["environment"]
    assert not [name for name in held if "SQL_ALCHEMY" in name or "FERNET" in name or "JWT" in name]
    assert "${AIRFLOW_DB_PASSWORD" not in str(SERVICES["worker"])


def test_workers_alone_have_no_fixed_share_of_the_cores_and_give_way() -> None:
    weights = {name: service.get("cpu_shares", 1024) for name, service in SERVICES.items()}
    assert {name for name, weight in weights.items() if weight < 1024} == {"worker", "worker-gpu"}
    open_ended = {name: service["cpus"] for name, service in SERVICES.items() if not isinstance(service["cpus"], int)}
    assert open_ended == {"worker": "${WORKER_CPUS:-0}", "worker-gpu": "${WORKER_CPUS:-0}"}


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_confined_limited_and_watched(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert service["mem_limit"] and service["pids_limit"] and service["cpus"]
    assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}
    assert not service["image"].endswith(":latest") and ":" in service["image"]
    if service["image"].startswith("ballast-"):
        assert service["read_only"]
        assert name in ONCE or "BALLAST_HEALTH" in service["environment"] or "healthcheck" in service
    else:
        assert "healthcheck" in service


def test_depends_on_always_names_a_condition() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] in ("service_healthy", "service_completed_successfully"), (name, needed)
            assert (how["condition"] == "service_completed_successfully") == (needed in ONCE), (name, needed)


def test_dockerfile_targets_run_without_root_from_a_pinned_base() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "ARG BASE=python:3.11-slim-bookworm" in lines
    stages = "\n".join(lines).split("\nFROM ")
    for target in ("airflow", "pipeline"):
        stage = next(stage for stage in stages if stage.splitlines()[0].endswith(f" AS {target}"))
        users = re.findall(r"(?m)^USER (\S+)", stage)
        assert users == ["10001"], target
        assert "HEALTHCHECK" in stage and "org.opencontainers.image.revision" in stage
    assert not [line for line in lines if re.match(r"ADD |.*(curl|wget) .*\| *(ba)?sh|.*sudo ", line)]


def test_make_secrets_are_the_owner_s_alone_and_stay(tmp_path: Path) -> None:
    file = tmp_path / "secrets" / "stack.env"
    assert set(make(file)) == set(SECRETS)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    before = file.read_text()
    assert len({line.partition("=")[2] for line in before.splitlines()}) == len(SECRETS)
    assert make(file) == []
    kept, dropped = before.splitlines()[:-1], before.splitlines()[-1]
    file.write_text("\n".join(kept) + "\n")
    assert make(file) == [dropped.partition("=")[0]]
    assert file.read_text().splitlines()[:-1] == kept


def test_workers_alone_take_a_file_of_secrets_that_need_not_be_there() -> None:
    files = {name: service["env_file"] for name, service in SERVICES.items() if "env_file" in service}
    own = [{"path": "deploy/secrets/worker.env", "required": False}]
    assert files == {"worker": own, "worker-gpu": own}


def test_git_ignores_secrets_backups_and_bundle() -> None:
    secrets = ["deploy/secrets/stack.env", "deploy/secrets/worker.env"]
    paths = [*secrets, "backups/x/airflow.dump", "deploy/project.bundle"]
    done = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == paths


def test_workers_may_load_what_was_compiled_and_nobody_else() -> None:
    ours = {name: service["tmpfs"] for name, service in SERVICES.items() if service["image"].startswith("ballast-")}
    assert {name for name, (tmp,) in ours.items() if "exec" in tmp} == {"worker", "worker-gpu"}
