"""The Compose stack for real, with its monitoring: built, started, asked without credentials and with too few; an alert
that starts a retraining through Celery; an upgrade to another commit; a backup put back.

Needs a Docker engine and the public images (or stand-ins of their names; without one of Grafana all but Grafana is
started). Everything is a project of its own, with secrets, ports and volumes of its own. ``TORCH_INDEX`` is handed on
to the build.
"""

import json
import re
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
import yaml

from pipelines.dagruns import Refused
from tests import docker_engine
from tests.compose.stack import ROOT, Stack
from tests.waiting import until

pytestmark = [
    pytest.mark.compose,
    # An answer that refuses holds its socket until it is collected, which may be in another test.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
ALERT = {"alertname": "WeatherFeedMended", "ballast_action": "retrain", "ballast_as_of": "2013-04-01"}
# Panels about a window, while none was monitored; and those that show only what is wrong or under way.
MAY_BE_EMPTY = re.compile(r"ballast_(window|model|drift|prediction|data)_|ballast_policy_verdict|> \d|^ALERTS|_since_")
# Run where Prometheus, Alertmanager and the bridge can be reached; the bridge's certificate is there too.
ASK = """
import json, ssl, sys, urllib.error, urllib.request
urls, body, headers = map(json.loads, sys.argv[1:])
context = ssl.create_default_context(cafile="/var/lib/bridge/shown/cert.pem")
answers = []
for url in urls:
    request = urllib.request.Request(url, body.encode() or None, {"Content-Type": "application/json", **headers})
    try:
        answer = urllib.request.urlopen(request, timeout=20, context=context)
    except urllib.error.HTTPError as error:
        answer = error
    answers.append((answer.status, answer.read().decode()))
print(json.dumps(answers))
"""


def has(image: str) -> bool:
    """Whether the engine has an image, or can get it."""
    return any(
        subprocess.run(["docker", *how, image], capture_output=True, check=False).returncode == 0
        for how in (["image", "inspect"], ["pull", "--quiet"])
    )


def has_otlp(image: str) -> bool:
    """Whether this Prometheus can receive OTLP."""
    command = ["docker", "run", "--rm", image, "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return "enable-otlp-receiver" in said.stdout + said.stderr


class Monitored(Stack):
    """The stack with its monitoring."""

    def mlflow(self, path: str, body: dict[str, str] | None, user: str, password: str) -> int:
        """The status that MLflow answers a person with."""
        login = b64encode(f"{user}:{password}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
        url = f"{self.url('MLFLOW_PORT')}/api/2.0/mlflow/{path}"
        try:
            with urlopen(Request(url, json.dumps(body).encode() if body else None, headers), timeout=20) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code

    def ask(self, *urls: str, body: str = "", **headers: str) -> list[tuple[int, str]]:
        """What services without a published port answer: the status, and what they say."""
        asked = [json.dumps(one) for one in (urls, body, headers)]
        answers: list[tuple[int, str]] = json.loads(self.run("exec", "-T", "bridge", "python", "-c", ASK, *asked))
        return answers

    def prometheus(self, *paths: str) -> list[Any]:
        """What Prometheus' API answers."""
        answers = self.ask(*(f"http://prometheus:9090/api/v1/{path}" for path in paths))
        assert {status for status, _ in answers} == {HTTPStatus.OK}, answers
        return [json.loads(said)["data"] for _, said in answers]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    docker_engine.needed()
    folder = tmp_path_factory.mktemp("compose")
    env = {"AIRFLOW_METRICS": "True", "BALLAST_TAG": "test"}  # its upgrade builds images of that tag
    stack = Monitored("ballast-test", folder, 26000, profiles=("monitoring",), **env)
    stack.run("--profile", "*", "config", "--quiet")
    if not has(stack.image("grafana")):
        print("\nwithout Grafana: there is no image of it here")
        stack.files.append("tests/compose/no_grafana.yml")
    if not has_otlp(stack.image("prometheus")):
        stack.files.append("tests/compose/receiver.yml")
    began = time.monotonic()
    stack.build()
    built = time.monotonic()
    print(f"\nbuilt in {built - began:.0f} s")
    try:
        stack.start()
        print(f"all healthy {time.monotonic() - built:.0f} s after `up`")
        print(stack.run("stats", "--no-stream", "--format", "{{.Name}}\t{{.MemUsage}}\t{{.CPUPerc}}"))
        yield stack
    finally:
        stack.remove()


def test_user_interfaces_without_credentials_refuse(stack: Monitored) -> None:
    for url in (
        f"{stack.url('AIRFLOW_PORT')}/api/v2/dags",
        f"{stack.url('MLFLOW_PORT')}/api/2.0/mlflow/experiments/search?max_results=1",
        f"{stack.url('MLFLOW_PORT')}/api/2.0/mlflow-artifacts/artifacts?path=1",
    ):
        with pytest.raises(HTTPError) as refused:
            urlopen(url, timeout=20)
        refused.value.close()
        assert refused.value.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN), url


def test_roles_viewer_cannot_trigger_and_operator_cannot_approve(stack: Monitored) -> None:
    for name, role in (("viewer", "Viewer"), ("operator", "Operator"), ("approver", "Approver")):
        account = ["--username", name, "--password", f"{name}-password", "--role", role]
        person = ["--firstname", name, "--lastname", name, "--email", f"{name}@ballast.invalid"]
        stack.run("exec", "-T", "api-server", "airflow", "users", "create", *account, *person)
    conf = {"reason": "a test of roles"}
    for name in ("viewer", "approver"):
        person_s = stack.airflow(name, f"{name}-password")
        assert person_s.dags()
        # Nothing but `promote` is an approver's, which FAB lets nobody answer a form of who may not edit it.
        for dag_id in ("retrain_scheduled", "rollback", *(["promote"] if name == "viewer" else [])):
            with pytest.raises(Refused) as refused:
                person_s.queue(dag_id, "by-a-viewer", conf)
            assert refused.value.status == HTTPStatus.FORBIDDEN
    for name in ("viewer", "operator"):
        with pytest.raises(Refused) as refused:
            stack.airflow(name, f"{name}-password").answer("promote", "none", "approve", "Approve")
        assert refused.value.status == HTTPStatus.FORBIDDEN


def test_registry_may_be_read_and_not_moved_by_who_has_an_account_only(stack: Monitored) -> None:
    reader = ("reader", "reader-password")
    account = dict(zip(("username", "password"), reader, strict=True))
    assert stack.mlflow("users/create", account, "admin", stack.secrets["MLFLOW_ADMIN_PASSWORD"]) == HTTPStatus.OK
    worker = ("worker", stack.secrets["MLFLOW_WORKER_PASSWORD"])
    assert stack.mlflow("registered-models/create", {"name": "roles"}, *worker) == HTTPStatus.OK
    assert stack.mlflow("registered-models/get?name=roles", None, *reader) == HTTPStatus.OK
    for path in ("registered-models/alias", "model-versions/create"):
        body = {"name": "roles", "alias": "champion", "version": "1", "source": "models:/roles/1"}
        assert stack.mlflow(path, body, *reader) == HTTPStatus.FORBIDDEN


def test_containers_run_without_root_or_the_engine(stack: Monitored) -> None:
    for service in ("api-server", "scheduler", "dag-processor", "triggerer", "worker", "mlflow"):
        said = stack.run(
            "exec", "-T", service, "sh", "-c", "id -u; ls /var/run/docker.sock; touch /opt/x && echo writes; true"
        )
        assert said.split() == ["10001"], service
    held = stack.run("exec", "-T", "worker", "env")
    assert stack.secrets["AIRFLOW_DB_PASSWORD"] not in held and stack.secrets["AIRFLOW_JWT_SECRET"] not in held


@pytest.mark.parametrize("service", ["api-server", "worker"])
def test_image_holds_no_secret_and_nothing_that_was_not_committed(stack: Monitored, service: str) -> None:
    image = stack.image(service)
    made = stack.call("docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    made += stack.call("docker", "image", "inspect", image)
    assert not re.search(r"(?i)(password|secret|token|_key)\w*=\S", made)
    look = (
        "find / -xdev ( -name stack.env -o -name .netrc -o -name .pypirc -o -name .git-credentials -o -name id_rsa"
        " -o -name id_ed25519 ) -print"
    )
    assert stack.call("docker", "run", "--rm", "--network=none", "--user=0", image, *look.split()) == ""
    if service == "worker":
        status = ["git", "-C", "/opt/ballast", "status", "--porcelain", "--ignored"]
        more = stack.call("docker", "run", "--rm", "--network=none", image, *status).splitlines()
        assert [line for line in more if not line.endswith("__pycache__/")] == []


def test_networks_publish_user_interfaces_and_keep_stores_apart(stack: Monitored) -> None:
    running = [json.loads(line) for line in stack.run("ps", "--format", "json").splitlines()]
    published = {
        (one["Service"], port["URL"], str(port["PublishedPort"]))
        for one in running
        for port in one["Publishers"] or []
        if port["PublishedPort"]
    }
    meant = {"api-server": "AIRFLOW_PORT", "mlflow": "MLFLOW_PORT", "grafana": "GRAFANA_PORT"}
    assert published == {(name, "127.0.0.1", stack.ports[meant[name]]) for name in meant if name in stack.services()}
    for service, others in {"bridge": "redis s3", "mlflow": "redis prometheus", "worker": "s3 prometheus"}.items():
        for other in others.split():
            look = f"import socket\ntry: print(socket.gethostbyname('{other}'))\nexcept OSError: print('unknown')"
            assert stack.run("exec", "-T", service, "python", "-c", look).strip() == "unknown", (service, other)


def test_prometheus_scrapes_both_by_tls_and_has_every_rule(stack: Monitored) -> None:
    def targets() -> dict[str, Any]:
        return {target["labels"]["job"]: target for target in stack.prometheus("targets")[0]["activeTargets"]}

    found = until("scrapes", lambda: all(one["health"] == "up" for one in targets().values()) and targets())
    assert {job: one["scrapeUrl"] for job, one in found.items()} == {
        "ballast-exporter": "http://exporter:9180/metrics",
        "ballast-bridge": "https://bridge:9190/metrics",
    }
    (up,) = stack.prometheus("query?query=up")
    assert {one["metric"]["job"]: one["value"][1] for one in up["result"]} == {
        "ballast-exporter": "1",
        "ballast-bridge": "1",
    }

    def rules() -> dict[str, Any]:
        return {rule["name"]: rule for group in stack.prometheus("rules")[0]["groups"] for rule in group["rules"]}

    until("every rule is evaluated", lambda: {rule["health"] for rule in rules().values()} == {"ok"})
    file = yaml.safe_load((ROOT / "monitoring" / "prometheus" / "rules" / "ballast.yml").read_text())
    assert set(rules()) == {rule["alert"] for group in file["groups"] for rule in group["rules"]}
    (receivers,) = stack.prometheus("alertmanagers")
    assert [one["url"] for one in receivers["activeAlertmanagers"]] == ["http://alertmanager:9093/api/v2/alerts"]


def test_bridge_without_the_token_refuses(stack: Monitored) -> None:
    body = json.dumps({"action": "retrain", "source": "nobody", "key": "1", "reason": "none"})
    for headers in ({}, {"Authorization": "Bearer " + "0" * 48}):
        ((status, _),) = stack.ask("https://bridge:9190/trigger", body=body, **headers)
        assert status == HTTPStatus.UNAUTHORIZED
    assert json.loads(stack.ballast("alerts", "--json"))["alerts"] == []


def test_alert_retrains_through_celery_and_is_on_record(stack: Monitored) -> None:
    stack.airflow("operator", "operator-password").set_paused("retrain_on_alert", False)
    began = time.monotonic()
    alert = [{"labels": ALERT, "annotations": {"summary": "The weather of March was delivered again"}}]
    ((status, said),) = stack.ask("http://alertmanager:9093/api/v2/alerts", body=json.dumps(alert))
    assert status == HTTPStatus.OK, said
    known = until("the bridge has it", lambda: json.loads(stack.ballast("alerts", "--json"))["alerts"])
    assert [one["payload"]["labels"]["alertname"] for one in known] == [ALERT["alertname"]]
    stack.ended("retrain_on_alert", known[0]["run_id"])
    until("the first champion", lambda: "champion   v1" in stack.status())
    print(f"first champion {time.monotonic() - began:.0f} s after the alert")
    (settled,) = json.loads(stack.ballast("alerts", "--json"))["alerts"]
    assert settled["status"] == "started"
    assert ALERT["alertname"] in stack.ballast("explain", "1")


def test_dashboards_every_query_is_answered_by_this_prometheus(stack: Monitored) -> None:
    pages = (ROOT / "monitoring" / "grafana" / "dashboards").glob("*.json")
    found = [json.loads(one) for page in pages for one in re.findall(r'"expr": ("(?:[^"\\]|\\.)*")', page.read_text())]
    assert len(found) > 40
    answers = stack.prometheus(*(f"query?query={quote(query)}" for query in found))
    data = {query for query, answer in zip(found, answers, strict=True) if answer["result"]}
    assert [query for query in found if query not in data and not MAY_BE_EMPTY.search(query)] == []
    assert "ballast_champion_version" in data


def test_airflow_sends_metrics_of_its_own_as_documented(stack: Monitored) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(airflow_\w+)` \| ([\w-]+) \|", page, re.M)
    assert rows
    until("they come", lambda: set(rows) <= airflow_metrics(stack))


def airflow_metrics(stack: Monitored) -> set[tuple[str, str]]:
    """Those that have come, each with the service that sent it."""
    if "receiver" not in stack.services():
        (found,) = stack.prometheus("series?match[]=" + quote('{__name__=~"airflow_.+"}'))
        return {(one["__name__"], one["job"].removeprefix("airflow-")) for one in found}
    ((_, said),) = stack.ask("http://receiver:9090")
    told = json.loads(said)
    return {(name, service.removeprefix("airflow-")) for service, names in told.items() for name in names}


def test_upgrade_brings_another_commit_and_its_backup_all_that_was(stack: Monitored, tmp_path: Path) -> None:
    before, history = stack.status(), stack.ballast("history")
    checkout, backup = tmp_path / "checkout", tmp_path / "backup"
    stack.call("git", "clone", "--quiet", str(ROOT), str(checkout))
    params = checkout / "params.yaml"
    params.write_text(re.sub(r"\bapproval: never", "approval: always", params.read_text()))
    commit = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--all", "-m", "Newer"]
    stack.call(*commit, cwd=checkout)
    newer = stack.call("git", "rev-parse", "HEAD", cwd=checkout).strip()
    said = [f"COMPOSE={' '.join(stack.command)}", f"BACKUP={backup}", "PROFILES=monitoring", "WORKERS=2"]
    stack.call("make", "compose-upgrade", *said, cwd=checkout)
    assert (stack.status(), stack.ballast("history")) == (before, history)
    assert stack.run("ps", "--format", "{{.Service}}").split().count("worker") == 2
    label = ["--format", '{{index .Config.Labels "org.opencontainers.image.revision"}}']
    for service in ("api-server", "worker"):
        assert stack.call("docker", "image", "inspect", *label, stack.image(service)) == newer
    stack.call("make", "compose-clean", said[0], cwd=checkout)

    airflow = stack.airflow()
    run = airflow.trigger("retrain_on_alert", "newer", {"as_of": "2013-07-01", "reason": "a person is asked now"})
    stack.ended(run.dag_id, run.run_id)
    assert airflow.result(run, "evaluate")["commit"] == newer
    (promotion,) = until("a promotion", lambda: airflow.started_by(run))

    def state_of_form() -> str | None:
        return next((task.state for task in airflow.tasks(promotion) if task.task_id == "approve"), None)

    until("the form", lambda: state_of_form() == "awaiting_input")
    stack.airflow("approver", "approver-password").answer("promote", promotion.run_id, "approve", "Approve")
    stack.ended("promote", promotion.run_id)
    assert "champion   v2" in stack.status()
    assert "approved by approver" in stack.ballast("history")

    stack.remove()
    stack.call("sh", "scripts/compose_restore.sh", str(backup), *stack.command)
    stack.start()
    assert (stack.status(), stack.ballast("history")) == (before, history)
    assert stack.airflow().find("retrain_on_alert", "newer") is None
    read = "import mlflow; mlflow.artifacts.download_artifacts('models:/flight_delays@champion', dst_path='/tmp/model')"
    stack.run("exec", "-T", "worker", "python", "-c", read)
    files = stack.run(
        "exec", "-T", "worker", "find", "/tmp/model", "-name", "model.skops", "-o", "-name", "network.pt2"
    )
    assert files
