"""Stages in containers of a real Docker engine, started by the real operator in a process as a worker has it.

Needs a Docker engine. Builds the image of the stages as the Compose stack does, from the commit that is checked out, or
takes the one whose id is in ``BALLAST_STAGE_IMAGE``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from tests import docker_engine
from tests.compose.stack import Stack
from tests.waiting import until

from .conftest import clean_environment, own_project

pytestmark = pytest.mark.e2e
NO_MLFLOW = "http://127.0.0.1:9"  # training goes on without
STAGES = ("land", "ingest", "validate", "prepare", "train", "evaluate")
AS_OF = "2024-03-20"
# What Airflow's task process does: execute, within the timeout, and on_kill at SIGTERM.
WORKER = """
import json, logging, os, signal, sys
from types import SimpleNamespace
sys.path.append("plugins")
from airflow.sdk.execution_time.timeout import timeout
from ballast_operators import StepOperator
step, run_id, attempt = sys.argv[1:]
operator = StepOperator(step=step)
ti = SimpleNamespace(task=operator, task_id=step, dag_id="d", run_id=run_id, try_number=int(attempt))
dag_run = SimpleNamespace(dag_id="d", run_id=run_id, run_type="manual", conf={})
signal.signal(signal.SIGTERM, lambda *_: operator.on_kill())
try:
    with timeout(int(os.environ.get("TIMEOUT_S", "600"))):
        result = operator.execute({"dag_run": dag_run, "params": {"as_of": "2024-03-20"}, "ti": ti})
except BaseException as error:
    print(f"raised {type(error).__name__}: {error}")
    sys.exit(1)
print("result " + json.dumps(result))
"""
# A stage that tells where it is, and does as its argument says.
PROBE = """
import json, os, pathlib, signal, sys, time
out = pathlib.Path("data/validate")
def asked(*_):
    (out / "asked").write_text("to end")
    sys.exit(143)
signal.signal(signal.SIGTERM, asked)
print("probe begins", flush=True)
def writable(place):
    try:
        pathlib.Path(place, "x").touch()
    except OSError:
        return False
    return True
what = sys.argv[1]
if what == "sleep":
    time.sleep(300)
while what == "speak":
    print("and on it goes", flush=True)
    time.sleep(0.001)
if what == "memory":
    kept = [bytearray(1 << 20) for _ in range(1 << 12)]
if what.isdigit():
    print("error: told to", file=sys.stderr)
    sys.exit(int(what))
places = ["/", "/tmp", ".", ".git", "data", "data/validate", os.environ["BALLAST_VAR"]]
found = {
    "user": [os.getuid(), os.getgid()],
    "interfaces": sorted(os.listdir("/sys/class/net")),
    "writable": [place for place in places if writable(place)],
    "var": sorted(os.listdir(os.environ["BALLAST_VAR"])),
    "environment": dict(os.environ),
}
(out / "result.json").write_text(json.dumps(found))
"""


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of the image that the stages run in."""
    docker_engine.needed()
    if given := os.environ.get("BALLAST_STAGE_IMAGE"):
        return given
    stack = Stack("ballast-test", tmp_path_factory.mktemp("secrets"), 26000)
    stack.build("project")
    return docker("image", "inspect", "--format", "{{.Id}}", stack.image("project"))


class Site:
    """A project with run-time state of its own, and a worker that runs its stages in containers."""

    def __init__(self, root: Path, image: str) -> None:
        self.root, self.image = own_project(root), image
        self.workers: list[subprocess.Popen[str]] = []

    def change(self, file: str, text: str) -> None:
        (self.root / file).write_text(text)
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        for command in (["add", "-A"], [*identity, "commit", "-qm", "A change"]):
            subprocess.run(["git", *command], cwd=self.root, check=True)

    def probe(self, does: str) -> None:
        """Make `validate` the one stage, and a probe."""
        self.change("probe.py", PROBE)
        outs = {"outs": ["data/validate/result.json"]}
        stages = {"validate": {"cmd": f"true && python probe.py {does}", "deps": ["probe.py"], **outs}}
        self.change("dvc.yaml", yaml.safe_dump({"stages": stages}))

    def start(self, stage: str, run_id: str = "r", attempt: int = 1, **more: str) -> subprocess.Popen[str]:
        settings = {
            "AIRFLOW_HOME": str(self.root / "var" / "airflow"),
            "BALLAST_STAGE_RUNNER": "container",
            "BALLAST_STAGE_IMAGE": self.image,
            "BALLAST_STAGE_SOURCE_NETWORK": "none",
            "BALLAST_STAGE_MLFLOW_NETWORK": "none",
            "DVC_SITE_CACHE_DIR": str(self.root / "var" / "dvc-site"),
            "MLFLOW_TRACKING_URI": NO_MLFLOW,
        }
        command = [sys.executable, "-c", WORKER, stage, run_id, str(attempt)]
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = clean_environment(**{**settings, **more})
        self.workers.append(subprocess.Popen(command, cwd=self.root, env=env, **output))
        return self.workers[-1]

    def run(self, stage: str, run_id: str = "r", attempt: int = 1, **more: str) -> str:
        """What a worker says that is waited for."""
        return self.start(stage, run_id, attempt, **more).communicate(timeout=900)[0]

    def result(self, stage: str, run_id: str = "r", attempt: int = 1, **more: str) -> dict[str, Any]:
        output = self.run(stage, run_id, attempt, **more)
        assert "\nresult {" in output, output
        found: dict[str, Any] = json.loads(output.rpartition("\nresult ")[2])
        return found

    def local(self, stage: str, run_id: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "pipelines.run", stage, "--dag-id=d", f"--run-id={run_id}", f"--as-of={AS_OF}"]
        site_cache = str(self.root / "var" / "dvc-site")
        env = clean_environment(DVC_SITE_CACHE_DIR=site_cache, MLFLOW_TRACKING_URI=NO_MLFLOW)
        done = subprocess.run(command, cwd=self.root, env=env, check=True, capture_output=True, text=True)
        found: dict[str, Any] = json.loads(done.stdout.rpartition("ballast-result ")[2])
        return found

    def containers(self, *labels: str) -> list[str]:
        wanted = [f"--filter=label={label}" for label in (f"ballast.var={self.root / 'var'}", *labels)]
        return docker("ps", "--all", "--quiet", "--no-trunc", *wanted).split()

    def workspace(self, run_id: str = "r") -> Path:
        return self.root / "var" / "runs" / "d" / run_id


def read_until(worker: subprocess.Popen[str], text: str) -> None:
    assert worker.stdout is not None
    said = []
    for line in worker.stdout:
        said.append(line)
        if text in line:
            return
    raise AssertionError("".join(said))


@pytest.fixture
def site(tmp_path: Path, image: str) -> Iterator[Site]:
    """A project; afterwards nothing of its containers may be left."""
    site = Site(tmp_path / "project", image)
    yield site
    for worker in site.workers:
        worker.kill()
        worker.wait()
        worker.stdout.close()  # type: ignore[union-attr]
    left = site.containers()
    if left:
        docker("rm", "--force", *left)
    assert not left, "a container was left behind"


def test_stages_in_containers_and_here_end_in_the_same_lock(site: Site) -> None:
    contained = [site.result(stage) for stage in STAGES]
    assert {result["image"] for result in contained} == {site.image}
    again = site.result("evaluate", attempt=2)
    assert (again["cached"], "image" in again) == (True, False)
    shutil.rmtree(site.root / ".dvc" / "cache")  # else the second run would take everything from it
    for stage, there in zip(STAGES, contained, strict=True):
        here = site.local(stage, "local")
        assert not here["cached"]
        print(f"{stage:<9} container {there['seconds']:5.1f} s · local {here['seconds']:5.1f} s")
    locks = [(site.workspace(run) / "dvc.lock").read_text() for run in ("r", "local")]
    assert locks[0] == locks[1]


def test_container_holds_no_more_than_its_stage_needs(site: Site) -> None:
    site.probe("nothing")
    secrets = {"AIRFLOW__API_AUTH__JWT_SECRET": "secret-of-airflow", "MLFLOW_TRACKING_PASSWORD": "secret-of-mlflow"}
    found = site.result("validate", OMP_NUM_THREADS="2", **secrets)
    assert found["user"] == ([10001, 10001] if os.geteuid() == 0 else [os.geteuid(), os.getegid()])
    assert found["interfaces"] == ["lo"]
    assert found["writable"] == ["/tmp", "data/validate"]
    assert found["var"] == ["runs"]
    held = found["environment"]
    assert (held["OMP_NUM_THREADS"], held["BALLAST_RUN"]) == ("2", "r")
    assert "BALLAST_STATE_URI" not in held
    assert not [value for value in held.values() if "secret" in value]


def test_container_is_limited_and_named_as_the_engine_sees_it(site: Site) -> None:
    site.probe("sleep")
    limits = {"BALLAST_STAGE_MEMORY": "2g", "BALLAST_STAGE_CPUS": "1.5", "BALLAST_STAGE_SHM": "256m"}
    worker = site.start("validate", attempt=2, **limits)
    read_until(worker, "probe begins")
    (container,) = site.containers("ballast.run=r")
    found = json.loads(docker("inspect", container))[0]
    host, labels = found["HostConfig"], found["Config"]["Labels"]
    assert (host["Memory"], host["NanoCpus"], host["ShmSize"]) == (2 << 30, 1_500_000_000, 256 << 20)
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges:true"])
    assert (host["ReadonlyRootfs"], host["Privileged"], host["Init"]) == (True, False, True)
    assert (host["NetworkMode"], host["PidsLimit"]) == ("none", 4096)
    assert "Health" not in found["State"]
    named = {name: labels[f"ballast.{name}"] for name in ("dag", "run", "task", "try")}
    assert named == {"dag": "d", "run": "r", "task": "validate", "try": "2"}
    worker.send_signal(signal.SIGTERM)
    assert "AirflowException: validate was killed (exit 143)" in worker.communicate(timeout=60)[0]
    assert (site.workspace() / "data" / "validate" / "asked").exists(), "a shell has kept the signal for itself"


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("65", "AirflowFailException: validate rejected the data: told to"),
        ("75", "AirflowException: validate can be tried again: told to"),
        ("3", r"AirflowFailException: validate failed (exit 3): told to"),
        ("memory", "AirflowException: validate was killed (exit 137): It needed more memory than its 100m."),
    ],
)
def test_container_exit_code_says_whether_to_try_again(site: Site, does: str, said: str) -> None:
    site.probe(does)
    output = site.run("validate", BALLAST_STAGE_MEMORY="100m")
    assert f"raised {said}" in output, output
    assert not (site.workspace() / "dvc.lock").exists()


def test_container_at_the_task_s_timeout_is_asked_to_end(site: Site) -> None:
    site.probe("sleep")
    assert "raised AirflowTaskTimeout" in site.run("validate", TIMEOUT_S="25")
    assert (site.workspace() / "data" / "validate" / "asked").exists()


def test_container_that_speaks_without_pause_is_asked_to_end(site: Site) -> None:
    """The signal may come while the worker holds the lock of its log."""
    site.probe("speak")
    for attempt in range(1, 6):
        worker = site.start("validate", attempt=attempt)
        read_until(worker, "and on it goes")
        worker.send_signal(signal.SIGTERM)
        assert "validate was killed (exit 143)" in worker.communicate(timeout=60)[0]
    assert (site.workspace() / "data" / "validate" / "asked").exists()


def test_container_of_a_killed_worker_goes_at_the_next_try(site: Site) -> None:
    site.probe("sleep")
    worker = site.start("validate")
    read_until(worker, "probe begins")
    worker.kill()
    worker.wait()
    (left,) = site.containers()
    other = site.start("validate", run_id="other")
    read_until(other, "probe begins")
    (theirs,) = site.containers("ballast.run=other")
    again = site.start("validate", attempt=2)
    read_until(again, "left behind by an earlier attempt")
    read_until(again, "probe begins")
    assert left not in site.containers()
    assert theirs in site.containers(), "the container of another run was removed"
    for process in (other, again):
        process.terminate()
        assert process.wait(60)


def test_training_in_a_container_goes_on_from_its_checkpoint(site: Site) -> None:
    params = yaml.safe_load((site.root / "params.yaml").read_text())
    params["train"] |= {"candidates": ["tabm"], "refit": False}
    params["train"]["tabm"] |= {"epochs": 12, "patience": 12}
    site.change("params.yaml", yaml.safe_dump(params, sort_keys=False))
    for stage in STAGES[:4]:
        site.result(stage)
    worker = site.start("train")
    read_until(worker, "epoch 2/")
    worker.terminate()
    assert "AirflowException: train was killed (exit 143)" in worker.communicate(timeout=60)[0]
    output = site.run("train", attempt=2)
    assert "goes on at epoch" in output, output
    whole = (site.workspace() / "dvc.lock").read_text()
    shutil.rmtree(site.root / ".dvc" / "cache")
    for stage in STAGES[:5]:
        site.local(stage, "unbroken")
    assert (site.workspace("unbroken") / "dvc.lock").read_text() == whole


def test_engine_away_is_tried_again(site: Site) -> None:
    output = site.run("land", DOCKER_HOST="tcp://127.0.0.1:9")
    assert "raised AirflowException: No Docker engine answers at tcp://127.0.0.1:9" in output, output
    assert not site.workspace().exists()


def test_image_that_does_not_come_whole_is_tried_again(site: Site) -> None:
    """A registry that has the image's manifest, and fails at what it names."""
    kind = "application/vnd.oci.image"
    blob = {"size": 7, "digest": f"sha256:{'0' * 64}"}
    parts = {
        "config": {"mediaType": f"{kind}.config.v1+json", **blob},
        "layers": [{"mediaType": f"{kind}.layer.v1.tar+gzip", **blob}],
    }
    manifest = json.dumps({"schemaVersion": 2, "mediaType": f"{kind}.manifest.v1+json", **parts}).encode()
    digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here = self.path == "/v2/" or "/manifests/" in self.path
            self.send_response(HTTPStatus.OK if here else HTTPStatus.INTERNAL_SERVER_ERROR)
            self.send_header("Content-Type", f"{kind}.manifest.v1+json")
            self.send_header("Docker-Content-Digest", digest)
            self.send_header("Content-Length", str(len(manifest)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(manifest)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as registry:
        Thread(target=registry.serve_forever).start()
        image = f"127.0.0.1:{registry.server_port}/stage@{digest}"
        output = site.run("land", BALLAST_STAGE_IMAGE=image)
        registry.shutdown()
    assert f"raised AirflowException: Pulling {image} failed; the task can be tried again: " in output, output


@pytest.mark.skipif(
    not os.environ.get("CHAOS_ENGINE"),
    reason="it kills the Docker engine: CHAOS_ENGINE has to name the command that starts it again",
)
def test_engine_killed_in_each_stage_is_tried_again_to_the_same_lock(site: Site) -> None:
    for stage in STAGES:
        worker = site.start(stage)
        while not site.containers(f"ballast.task={stage}"):
            assert worker.poll() is None, worker.stdout.read()  # type: ignore[union-attr]
            time.sleep(0.2)
        began = time.monotonic()
        os.kill(docker_engine.pid(), signal.SIGKILL)
        output = worker.communicate(timeout=120)[0]
        (said,) = [line for line in output.splitlines() if line.startswith("raised ")]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(os.environ["CHAOS_ENGINE"], shell=True, check=True, **quiet)
        until("the engine answers", docker_engine.answers)
        assert not site.result(stage, attempt=2)["cached"]
        print(f"{stage:<9} {said[:90]}… green {time.monotonic() - began:.0f} s after the kill")
        assert said.startswith("raised AirflowException: ") and "can be tried again" in said
    shutil.rmtree(site.root / ".dvc" / "cache")
    for stage in STAGES:
        site.local(stage, "unbroken")
    locks = [(site.workspace(run) / "dvc.lock").read_text() for run in ("r", "unbroken")]
    assert locks[0] == locks[1]
