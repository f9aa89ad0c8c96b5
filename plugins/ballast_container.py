"""A DVC stage in a container: Airflow's DockerOperator, with what the stage needs and nothing else.

Where ``BALLAST_STAGE_RUNNER`` is ``container``, ``python -m pipelines.run`` still holds the workspace, asks the run
cache and records. Only the stage's command it leaves to us, as a line of JSON (``pipelines/container.py``).
docs/operations.md has the settings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cached_property, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from airflow.providers.docker.exceptions import DockerContainerFailedException
from airflow.providers.docker.operators.docker import DockerOperator
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from docker import APIClient
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import DeviceRequest, Healthcheck, Mount
from requests.exceptions import RequestException

PINNED = re.compile(r"([^@]+@)?sha256:[0-9a-f]{64}")
IMAGE_USER = "10001:10001"  # of the image that the Dockerfile builds
# Airflow kills a task 5 s after SIGTERM; the container has less, so that its removal fits in.
STOP_S = 4
# What DockerOperator has no argument for.
CONFINED: dict[str, Any] = {
    "read_only": True,
    "tmpfs": {"/tmp": "exec,mode=1777"},  # exec: what torch compiles lies there
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
    "pids_limit": 4096,
    "init": True,
}
ENVIRONMENT = {
    "HOME": "/tmp",
    "USER": "ballast",  # the image need not know the user's id
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",  # the code cannot be written to
    "TINI_KILL_PROCESS_GROUP": "1",  # a signal reaches the stage, and not only a shell above it
}
PASSING = {HTTPStatus.CONFLICT, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}  # may be tried again
NETWORKS = {"source": "BALLAST_STAGE_SOURCE_NETWORK", "mlflow": "BALLAST_STAGE_MLFLOW_NETWORK"}


class StageContainer(DockerOperator):
    """The containers of one task. What an earlier attempt has left of them is removed when this is made.

    Each is asked to end before it is removed, so that a training leaves its checkpoint: ``auto_remove="force"`` would
    kill it where the task has timed out.
    """

    def __init__(self, *, context: Context, **kwargs: Any) -> None:
        ti = context["ti"]
        super().__init__(
            task_id=ti.task_id,
            image=_image(),
            user=_user(),
            mem_limit=os.environ.get("BALLAST_STAGE_MEMORY") or "8g",
            shm_size=os.environ.get("BALLAST_STAGE_SHM") or "1g",  # type: ignore[arg-type]  # docker-py knows units
            docker_conn_id=os.environ.get("BALLAST_DOCKER_CONN") or None,
            mount_tmp_dir=False,
            auto_remove="never",
            **_tls(),
            **kwargs,
        )
        self._asked_to_end = False
        var = os.environ.get("BALLAST_VAR") or str(Path(__file__).resolve().parent.parent / "var")
        with self._speaking():
            names = {"dag": ti.dag_id, "run": ti.run_id, "task": ti.task_id, "var": self._there(var)}
            mine = {f"ballast.{name}": value for name, value in names.items()}
            self.labels = {**mine, "ballast.try": str(ti.try_number)}
            self._remove_leftovers(mine)

    def run(self, request: Mapping[str, Any]) -> tuple[int, list[str]]:
        """Run what ``pipelines.run`` asks for; return its exit code and, where that is not 0, what it said."""
        self.command, self.working_dir = request["command"], request["cwd"]
        self.network_mode = _network(request["network"])
        self.device_requests = _gpus() if request["gpu"] else None
        self._private_environment = _environment(request, self.image)
        said: Sequence[str | bytes] = []
        with self._speaking():
            self.mounts = self._mounts(request)
            self._pull()
            try:
                self._run_image()
            except DockerContainerFailedException as failed:
                said = failed.logs or []
            finally:
                state = self._end()
        lines = [str(line) for line in said]
        if state["OOMKilled"]:
            lines.append(f"error: It needed more memory than its {self.mem_limit}. Raise BALLAST_STAGE_MEMORY.")
        return int(state["ExitCode"]), lines

    def on_kill(self) -> None:
        """Have the container end, also one that is only about to start."""
        self._asked_to_end = True
        with suppress(NotFound):  # it has ended meanwhile, and was removed
            super().on_kill()

    @cached_property
    def cli(self) -> APIClient:
        """The engine's client, with what DockerOperator has no argument for."""
        try:
            client = super().cli
        except AirflowException as error:
            raise AirflowException(
                f"No Docker engine answers at {self.docker_url} (the line above says why). "
                "Start it, or mend DOCKER_HOST; the task can be tried again."
            ) from error
        confined = {**CONFINED, "nano_cpus": _nano_cpus()}
        start = client.start

        def start_unless_ended(container: str) -> None:
            if self._asked_to_end:
                raise AirflowException("The task was asked to end before its container had started.")
            start(container)

        def lines(container: str, **_: object) -> Iterator[bytes]:
            # Attached by TLS, docker-py polls the socket beneath, and keeps each line back until the next comes.
            yield from client.logs(container, stream=True, follow=True)

        client.create_host_config = partial(client.create_host_config, **confined)
        no_check = Healthcheck(test=["NONE"])  # the image's own is of services
        client.create_container = partial(client.create_container, stop_timeout=STOP_S, healthcheck=no_check)
        client.start = start_unless_ended
        client.attach = lines
        return client

    def _remove_leftovers(self, labels: Mapping[str, str]) -> None:
        wanted = [f"{name}={value}" for name, value in labels.items()]
        for left in self.cli.containers(all=True, filters={"label": wanted}):
            self.log.info("removing container %s, left behind by an earlier attempt", left["Id"][:12])
            with suppress(NotFound):
                self.cli.stop(left["Id"])  # one that still trains saves its checkpoint
                self.cli.remove_container(left["Id"], v=True, force=True)

    def _pull(self) -> None:
        try:
            self.cli.inspect_image(self.image)
        except ImageNotFound:
            self.log.info("pulling %s", self.image)
            for said in self.cli.pull(self.image, stream=True, decode=True):  # else an error on the way is lost
                if error := said.get("error"):
                    raise AirflowException(
                        f"Pulling {self.image} failed; the task can be tried again: {error}"
                    ) from None

    def _end(self) -> dict[str, Any]:
        """Ask the container to end, if it has not, and remove it; return its last state."""
        if self.container is None:
            return {}
        made, self.container = self.container["Id"], None  # type: ignore[assignment]
        self.cli.stop(made)
        state: dict[str, Any] = self.cli.inspect_container(made)["State"]
        self.cli.remove_container(made, v=True, force=True)
        return state

    def _mounts(self, request: Mapping[str, Any]) -> list[Mount | dict[str, Any]]:
        """The stage's paths as they are here; those that it writes to belong to its user, where root made them."""
        for path in request["writes"] if os.geteuid() == 0 else ():
            _hand_over(Path(path), str(self.user))
        return [
            Mount(request["hides"], None, "tmpfs", tmpfs_mode=0o755),
            *(Mount(path, self._there(path), "bind", read_only=True) for path in request["reads"]),
            *(Mount(path, self._there(path), "bind") for path in request["writes"]),
        ]

    def _there(self, path: str) -> str:
        """Where the engine finds what lies at ``path`` here (``BALLAST_STAGE_MOUNTS``)."""
        given = [pair.split("=", 1) for pair in filter(None, os.environ.get("BALLAST_STAGE_MOUNTS", "").split(","))]
        if wrong := [pair for pair in given if len(pair) < 2 or not pair[0].startswith("/")]:
            raise AirflowFailException(
                f"BALLAST_STAGE_MOUNTS must be pairs such as /var/lib/ballast=ballast_var (found {wrong[0][0]!r})."
            )
        for here, there in sorted(given, reverse=True):
            if path == here or path.startswith(f"{here}/"):
                root = there if there.startswith("/") else self.cli.inspect_volume(there)["Mountpoint"]
                return root + path.removeprefix(here)
        return path

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Tell a setting that the engine refuses from an engine that is away."""
        try:
            yield
        except APIError as error:
            if error.is_client_error() and error.status_code not in PASSING:
                raise AirflowFailException(f"The Docker engine refuses it: {error.explanation or error}.") from error
            raise AirflowException(f"The Docker engine failed; the task can be tried again: {error}.") from error
        except RequestException as error:
            raise AirflowException(f"The Docker engine went away; the task can be tried again: {error}.") from error
        except DockerException as error:
            raise AirflowFailException(f"The Docker client cannot use a setting: {error}.") from error


def _image() -> str:
    image = os.environ.get("BALLAST_STAGE_IMAGE") or ""
    if not PINNED.fullmatch(image):
        raise AirflowFailException(
            "BALLAST_STAGE_IMAGE must name an image by its digest, NAME@sha256:…, or one that the engine has by its "
            f"id, sha256:… (found {image!r}). `docker image inspect --format '{{{{.RepoDigests}}}} {{{{.Id}}}}' NAME` "
            "prints both."
        )
    return image


def _user() -> str:
    """The worker's user; where that is root, the one that is set, or the image's."""
    worker, given = f"{os.geteuid()}:{os.getegid()}", os.environ.get("BALLAST_STAGE_USER")
    if os.geteuid() != 0 and given not in (None, "", worker):
        raise AirflowFailException(
            f"BALLAST_STAGE_USER must be unset, or the worker's own {worker}, which is not root (found {given!r}): "
            "the worker could not keep what another user wrote."
        )
    user = (given or IMAGE_USER) if os.geteuid() == 0 else worker
    if not re.fullmatch(r"[1-9]\d*:\d+", user):
        raise AirflowFailException(
            f"BALLAST_STAGE_USER must be the numbers of a user that is not root and a group, such as {IMAGE_USER} "
            f"(found {user!r})."
        )
    return user


def _hand_over(folder: Path, user: str) -> None:
    """Give the folders to the user. Files are replaced, never written in place: theirs do not matter."""
    uid, gid = map(int, user.split(":"))
    for path, _, _ in os.walk(folder):
        os.chown(path, uid, gid)


def _network(need: str | None) -> str:
    return (os.environ.get(NETWORKS[need]) or "bridge") if need else "none"


def _nano_cpus() -> int | None:
    asked = os.environ.get("BALLAST_STAGE_CPUS") or "0"
    if not re.fullmatch(r"\d+(\.\d+)?", asked):
        raise AirflowFailException(f"BALLAST_STAGE_CPUS must be a number such as 1.5 (found {asked!r}).")
    return int(float(asked) * 1e9) or None


def _gpus() -> list[DeviceRequest] | None:
    asked = os.environ.get("BALLAST_STAGE_GPUS")
    if not asked:
        return None
    if asked != "all" and not re.fullmatch(r"[1-9]\d*", asked):
        raise AirflowFailException(f"BALLAST_STAGE_GPUS must be all or a number (found {asked!r}).")
    return [DeviceRequest(count=-1 if asked == "all" else int(asked), capabilities=[["gpu"]])]


def _environment(request: Mapping[str, Any], image: str) -> dict[str, str]:
    """What the stage needs to know: what it was told, and by name what only we know, secrets among it."""
    more = filter(None, os.environ.get("BALLAST_STAGE_ENV", "").split(","))
    patterns = [*request["names"], *more]
    ours = {name: value for name, value in os.environ.items() if any(fnmatchcase(name, one) for one in patterns)}
    return {**ENVIRONMENT, **ours, **request["env"], "BALLAST_IMAGE": image}


def _tls() -> dict[str, Any]:
    """Docker's own variables, of which DockerOperator reads DOCKER_HOST only."""
    folder, verify = os.environ.get("DOCKER_CERT_PATH"), os.environ.get("DOCKER_TLS_VERIFY")
    if not folder and not verify:
        return {}
    certificates = Path(folder or Path.home() / ".docker")
    files = {"tls_ca_cert": "ca.pem", "tls_client_cert": "cert.pem", "tls_client_key": "key.pem"}
    return {name: str(certificates / file) for name, file in files.items()} | {"tls_verify": bool(verify)}
