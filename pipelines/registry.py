"""The training runs and the registered versions in MLflow; the only module that holds an MlflowClient.

MLflow is a server (``MLFLOW_TRACKING_URI``) or, without one, its SQLite file under ``var/``. It is imported when
first needed: that takes about a second. The one registered model of a project is ``register.model`` of params.yaml.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines import params, places
from pipelines.errors import BallastError, TryAgain
from pipelines.files import sha256, whole_folder, write_json
from pipelines.schema import Features

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model, ModelSignature

log = logging.getLogger(__name__)

EXPERIMENT = "ballast"
DIGEST, LOCK = "ballast.digest", "ballast.lock"
ENVIRONMENT = "environment.json"
# What the pyfunc of a version needs beside this package; named here, so that MLflow infers nothing by running it.
REQUIREMENTS = (
    "mlflow",
    "duckdb",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "scikit-learn",
    "skops",
    "torch",
)


class RegisterParams(params.Params):
    """The ``register`` section of params.yaml."""

    model: str


@dataclass(frozen=True)
class Version:
    """One registered version: a model, by its digest, made under one dvc.lock."""

    number: int
    digest: str
    lock: str
    run_id: str
    created_at: datetime
    tags: Mapping[str, str]


@dataclass(frozen=True)
class RunData:
    """What a training run has logged: its parameters and the last value of each metric."""

    experiment_id: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]


# --- training runs


@dataclass
class LiveRun:
    """The MLflow run of a training that is under way; ``run_id`` is None while MLflow is away."""

    run_id: str | None
    logged: set[tuple[str, int]] = field(default_factory=set)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step. What an earlier attempt of the same run has logged is not logged again."""
        fresh = {name: value for name, value in metrics.items() if (name, step) not in self.logged}
        self.logged |= {(name, step) for name in fresh}
        if self.run_id and fresh:
            self._send(lambda run_id: client().log_batch(run_id, metrics=_metrics(fresh, step)))

    def trained(self, digest: str) -> None:
        """Name the model that came out, so that ``register`` finds this run where no DAG run ties them together."""
        if self.run_id:
            self._send(lambda run_id: client().set_tag(run_id, DIGEST, digest))

    def _send(self, call: Callable[[str], object]) -> None:
        try:
            call(self.run_id or "")
        except Exception as error:  # whatever MLflow raises: training is worth more than its live picture
            _warn_away(error)
            self.run_id = None


@contextmanager
def training_run(experiment: str, params: Mapping[str, Any]) -> Iterator[LiveRun]:
    """Log a training as it happens, to the run that the environment names or to a new one.

    The run is ``MLFLOW_RUN_ID``, else the one of the DAG run ``BALLAST_RUN``. MLflow away costs a warning, never the
    training: ``register`` fills what is missing from what ``train`` wrote.
    """
    live = _begin_run(experiment, params)
    if live.run_id and (links := os.environ.get("BALLAST_LINKS")):  # for the page of the Airflow task
        live._send(lambda run_id: write_json(Path(links), _ids(run_id)))
    status = "FAILED"
    try:
        yield live
        status = "FINISHED"
    finally:
        if live.run_id:
            live._send(lambda run_id: _end_run(run_id, status, params))


def _begin_run(experiment: str, params: Mapping[str, Any]) -> LiveRun:
    try:
        run = _find_run(experiment) or _create_run(experiment)
        client().update_run(run.info.run_id, status="RUNNING")
        _log_params(run, params)
        return LiveRun(run.info.run_id, _history(run))
    except Exception as error:  # as in LiveRun._send
        _warn_away(error)
        return LiveRun(None)


def _end_run(run_id: str, status: str, params: Mapping[str, Any]) -> None:
    client().log_dict(run_id, environment("train", params), ENVIRONMENT)
    client().set_terminated(run_id, status)


def _warn_away(error: Exception) -> None:
    log.warning("MLflow does not take the metrics; training goes on, register fills them in later. %s", error)


def _find_run(experiment: str, digest: str | None = None) -> Run | None:
    """The run that the environment names, else the newest that made the model ``digest``."""
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        return client().get_run(run_id)
    tags = _dag_tags() or ({DIGEST: digest} if digest else {})
    return next(iter(_runs(experiment, tags)), None) if tags else None


def _runs(experiment: str, tags: Mapping[str, str]) -> list[Run]:
    """The runs with these tags, the newest first."""
    found = client().get_experiment_by_name(experiment)
    if found is None:
        return []
    where = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    return list(client().search_runs([found.experiment_id], where, order_by=["attributes.start_time DESC"]))


def _create_run(experiment: str) -> Run:
    tags = _dag_tags()
    name = f"{tags['ballast.dag']} {tags['ballast.run']}" if "ballast.dag" in tags else None
    return client().create_run(_experiment_id(experiment), tags=tags, run_name=name)


def _dag_tags() -> dict[str, str]:
    """The DAG run this process belongs to; empty on a laptop."""
    if not os.environ.get("BALLAST_RUN"):
        return {}
    names = {"ballast.run": "BALLAST_RUN", "ballast.dag": "BALLAST_DAG"}
    return {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}


def _experiment_id(name: str) -> str:
    """Find or make the experiment. Without a server its artifacts lie under var/; a server has its own place."""
    from mlflow.exceptions import MlflowException

    if found := client().get_experiment_by_name(name):
        return str(found.experiment_id)
    location = (places.mlflow_artifacts() / name).as_uri() if _database() else None
    try:
        return str(client().create_experiment(name, artifact_location=location))
    except MlflowException:  # another process was first
        if found := client().get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def _metrics(values: Mapping[str, float], step: int) -> list[Metric]:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    return [Metric(name, float(value), now, step) for name, value in values.items()]


def _history(run: Run) -> set[tuple[str, int]]:
    """The metrics and steps that a run has already."""
    names = run.data.metrics
    return {(name, point.step) for name in names for point in client().get_metric_history(run.info.run_id, name)}


def _log_params(run: Run, params: Mapping[str, Any]) -> None:
    """Log what the run does not have yet; MLflow refuses to change a parameter."""
    from mlflow.entities import Param

    fresh = {name: value for name, value in _flat(params).items() if name not in run.data.params}
    client().log_batch(run.info.run_id, params=[Param(name, value) for name, value in fresh.items()])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow's flat parameters: ``tabm.width``."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return flat


def environment(step: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the bits of a model depend on besides code, data and settings, as ``step`` finds it here."""
    import torch

    lock = Path("uv.lock")
    return {
        "recorded_by": step,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": params.get("threads"),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "uv_lock_sha256": sha256(lock) if lock.exists() else None,
    }


# --- runs as register fills them


@dataclass(frozen=True)
class Evidence:
    """What ``register`` puts with a training run: what is known of a model besides the model itself."""

    params: Mapping[str, Any]
    history: Mapping[int, Mapping[str, float]]
    metrics: Mapping[str, float]
    files: Sequence[tuple[Path, str]]
    """Files and folders, each with the name of the artifact folder it goes to; one that is not there is left out."""


def complete_run(experiment: str, digest: str, evidence: Evidence) -> str:
    """Find the run that trained the model ``digest`` (or make it: its training was cached) and fill what it lacks."""
    with _speaking():
        run = _find_run(experiment, digest) or _create_run(experiment)
        run_id = str(run.info.run_id)
        _log_params(run, evidence.params)
        live = LiveRun(run_id, _history(run))
        batch = [_metrics(_lacking(values, step, live), step) for step, values in evidence.history.items()]
        batch.append(_metrics(_lacking(evidence.metrics, 0, live), 0))
        points = [point for part in batch for point in part]
        for start in range(0, len(points), 1000):  # MLflow's limit
            client().log_batch(run_id, metrics=points[start : start + 1000])
        for path, under in evidence.files:
            if path.exists():
                _log_path(run_id, path, under)
        if not _has_artifact(run_id, ENVIRONMENT):
            client().log_dict(run_id, _environment_of(experiment, digest, evidence.params), ENVIRONMENT)
        client().set_tag(run_id, DIGEST, digest)
        if run.info.status != "FINISHED":
            client().set_terminated(run_id)
        return run_id


def _lacking(values: Mapping[str, float], step: int, live: LiveRun) -> dict[str, float]:
    return {name: value for name, value in values.items() if (name, step) not in live.logged}


def _environment_of(experiment: str, digest: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the training of the model found, in whichever run it was; without one, what is here."""
    for run in _runs(experiment, {DIGEST: digest}):
        if _has_artifact(run.info.run_id, ENVIRONMENT):
            found: dict[str, Any] = json.loads(_artifact(run.info.run_id, ENVIRONMENT))
            return found
    return environment("register", params)


def _has_artifact(run_id: str, path: str) -> bool:
    folder = path.rpartition("/")[0]
    return any(item.path == path for item in client().list_artifacts(run_id, folder or None))


def _log_path(run_id: str, path: Path, under: str) -> None:
    if path.is_dir():
        client().log_artifacts(run_id, str(path), under)
    else:
        client().log_artifact(run_id, str(path), under or None)


# --- versions


def name() -> str:
    """The project's registered model: ``register.model`` of the params.yaml here, else of the one beside the code."""
    here = Path("params.yaml")
    return params.load(here if here.exists() else places.ROOT / here, "register", RegisterParams).model


def register(
    folder: Path, features: Features, digest: str, lock: str, run_id: str, tags: Mapping[str, str]
) -> tuple[Version, bool]:
    """Register the model in ``folder``, which reads ``features``; return its version and whether it is new.

    The same digest under the same lock is the same version. The version and its tags are made in one transaction:
    killed before it there is none (at most a logged model that nothing points to), killed after it there is one.
    """
    with _speaking(), _locked(places.var() / "mlflow" / "register"):
        for known in versions():
            if (known.digest, known.lock) == (digest, lock):
                return known, False
        model_id = _log_model(folder, features, run_id)
        _make_sure_of_model()
        made = client().create_model_version(
            name(), f"models:/{model_id}", run_id, tags={**tags, DIGEST: digest, LOCK: lock}, model_id=model_id
        )
        return _version(made), True


def _log_model(folder: Path, features: Features, run_id: str) -> str:
    """Log the folder as a pyfunc that belongs to the run; return the logged model's id.

    By the client and not by ``mlflow.pyfunc.log_model``, which would open the finished run again.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    experiment_id = client().get_run(run_id).info.experiment_id
    logged = client().create_logged_model(experiment_id, "model", source_run_id=run_id)
    about = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "model"
        _write_pyfunc(path, folder, features, about)
        client().log_model_artifacts(logged.model_id, str(path))
    client().finalize_logged_model(logged.model_id, "READY")
    client().log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return str(logged.model_id)


def _write_pyfunc(path: Path, folder: Path, features: Features, about: Model) -> None:
    """The folder as MLflow's pyfunc, which ``pipelines.model`` loads: no code and no pickle in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MLflow's of its own type hints, and that there is no example
        from mlflow.pyfunc import save_model

        save_model(
            path=str(path),
            mlflow_model=about,
            loader_module="pipelines.model",
            data_path=str(folder),
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in REQUIREMENTS],
            signature=_signature(features),
        )


def _signature(features: Features) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    numeric = [ColSpec(DataType.double, column) for column in features.numeric]
    categorical = [ColSpec(DataType.string, column) for column in features.categorical]
    return ModelSignature(inputs=Schema([*numeric, *categorical]), outputs=Schema([ColSpec(DataType.double)]))


def _make_sure_of_model() -> None:
    from mlflow.exceptions import MlflowException

    try:
        client().create_registered_model(name())
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def versions() -> list[Version]:
    """Every registered version, the oldest first."""
    with _speaking():
        found = client().search_model_versions(f"name = '{name()}'", max_results=10_000)
        return sorted((_version(one) for one in found), key=lambda version: version.number)


def version(number: int) -> Version:
    """One version; raise BallastError if there is none of this number."""
    known = versions()
    for one in known:
        if one.number == number:
            return one
    there = ", ".join(f"v{one.number}" for one in known) or "none"
    raise BallastError(f"The registry has no {name()} v{number} (found {there}).")


def _version(found: ModelVersion) -> Version:
    tags = dict(found.tags)
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return Version(int(found.version), tags.get(DIGEST, ""), tags.get(LOCK, ""), found.run_id or "", created, tags)


def set_tags(number: int, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""
    with _speaking():
        for tag, value in tags.items():
            client().set_model_version_tag(name(), str(number), tag, value)


def model(number: int) -> Path:
    """The model folder of a version, fetched once and verified each time.

    Raises BallastError if the registry holds another model than the one that was registered under this number.
    """
    wanted = version(number)
    folder = places.var() / "models" / wanted.digest
    with _speaking(), _locked(folder):
        if not folder.exists():
            _fetch(wanted, folder)
        _verify(wanted, folder)
    return folder


def _fetch(wanted: Version, folder: Path) -> None:
    from mlflow.artifacts import download_artifacts

    where = client().get_model_version_download_uri(name(), str(wanted.number))
    with TemporaryDirectory() as scratch, whole_folder(folder) as part:
        fetched = download_artifacts(f"{where}/data/model", dst_path=scratch, tracking_uri=places.tracking_uri())
        shutil.copytree(fetched, part, dirs_exist_ok=True)


def _verify(wanted: Version, folder: Path) -> None:
    """Check every byte of the folder, without loading the model: that is for who uses it."""
    from pipelines.model import _verified

    if (found := _verified(folder)[1]) != wanted.digest:
        raise BallastError(
            f"{name()} v{wanted.number} was registered as model {wanted.digest[:12]}, and its folder is {found[:12]}. "
            f"Someone has replaced it: do not use this version. (Remove {folder} to fetch it again.)"
        )


# --- what runs and versions hold


def run_data(run_id: str) -> RunData:
    """What a training run has logged."""
    with _speaking():
        run = client().get_run(run_id)
        return RunData(str(run.info.experiment_id), dict(run.data.params), dict(run.data.metrics))


def attach(number: int, path: Path, under: str) -> dict[str, str]:
    """Put a file or folder with the training run of a version; return the ids of that run and its experiment."""
    run_id = version(number).run_id
    with _speaking():
        _log_path(run_id, path, under)
    return _ids(run_id)


def _ids(run_id: str) -> dict[str, str]:
    return {"run_id": run_id, "experiment_id": run_data(run_id).experiment_id}


def attached(number: int, under: str) -> bytes | None:
    """The bytes of an artifact of a version's training run; None if there is none of this name."""
    run_id = version(number).run_id
    with _speaking():
        return _artifact(run_id, under) if _has_artifact(run_id, under) else None


def _artifact(run_id: str, path: str) -> bytes:
    with TemporaryDirectory() as scratch:
        return Path(client().download_artifacts(run_id, path, scratch)).read_bytes()


def aliases() -> dict[str, int]:
    """The aliases of the registered model and the versions they point to.

    Read straight from the SQLite file where there is no server: a look should not cost MLflow's import.
    """
    if database := _database():
        if not database.exists():
            return {}
        query = "SELECT alias, version FROM registered_model_aliases WHERE name = ?"
        try:
            with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
                return {alias: int(number) for alias, number in connection.execute(query, [name()])}
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # the server is just making its tables
                return {}
            raise TryAgain(f"MLflow's database {database} cannot be read now ({error}). Try again.") from None
    with _speaking():
        found = client().search_registered_models(f"name = '{name()}'")
        return {alias: int(number) for model in found for alias, number in model.aliases.items()}


def project(champion: int | None, previous: int | None) -> None:
    """Make the aliases ``champion`` and ``previous`` say what the ledger says. Doing it again changes nothing."""
    with _speaking():
        for alias, number in {"champion": champion, "previous": previous}.items():
            if number is None:
                client().delete_registered_model_alias(name(), alias)
            else:
                client().set_registered_model_alias(name(), alias, str(number))


# --- the connection


def client() -> MlflowClient:
    """The client of ``places.tracking_uri()``; raise TryAgain if its server does not answer."""
    uri = places.tracking_uri()
    if uri.startswith("http"):
        _knock(uri)
    return _connect(uri)


def _knock(uri: str) -> None:
    """Raise TryAgain at once when nothing listens: MLflow itself would try for minutes."""
    address = urlsplit(uri)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=3).close()
    except OSError as error:
        raise TryAgain(
            f"The MLflow server at {uri} does not answer ({error}). Start it (`make run`), or unset "
            "MLFLOW_TRACKING_URI to use the SQLite file under var/."
        ) from None


@lru_cache(maxsize=1)
def _connect(uri: str) -> MlflowClient:
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    import mlflow

    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # it misses pip, which uv does without
    mlflow.set_tracking_uri(uri)  # parts of MLflow ask for this one, whatever the client was given
    if database := _database():
        with _locked(database):  # MLflow's first use migrates the file, and two migrations at once break each other
            return mlflow.MlflowClient(uri)
    return mlflow.MlflowClient(uri)


_SETTINGS = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
}


def _database() -> Path | None:
    """The SQLite file, where MLflow is one."""
    uri = places.tracking_uri()
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path`` alone; the kernel lets go of it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _speaking() -> Iterator[None]:
    """Turn what MLflow raises into what a person can act on: TryAgain where the server failed."""
    client()  # first of all: its settings count from MLflow's import on
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        yield
    except RequestException as error:
        raise TryAgain(f"MLflow at {places.tracking_uri()} broke off: {error}. Try again when it is up.") from None
    except MlflowException as error:
        away = error.message.startswith("API request to") or error.error_code == "TEMPORARILY_UNAVAILABLE"
        kind = TryAgain if away else BallastError
        raise kind(f"MLflow at {places.tracking_uri()} says: {error.message}") from None
