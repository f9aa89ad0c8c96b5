"""Training runs in MLflow: parameters, curves, data sets, system metrics; and the connection, which registry.py shares.

MLflow is a server (``MLFLOW_TRACKING_URI``) or, without one, its SQLite file under ``var/``. It is imported when
first needed: that takes about a second. `train` depends on this module: what it does not need belongs elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines import places
from pipelines.errors import BallastError, TryAgain
from pipelines.files import locked, sha256, whole_file, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, Metric, Run

log = logging.getLogger(__name__)

EXPERIMENT, TUNING = "ballast", "ballast-tune"
DIGEST, STUDY = "ballast.digest", "ballast.study"
ENVIRONMENT = "environment.json"
SYSTEM = "system/"  # MLflow's prefix of system metrics
SAMPLE_S = (
    2.0  # unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise; by MLflow's 10 short trainings show none
)
TRAINING = "training goes on, register fills them in later"
TUNING_ON = "tuning goes on, and nothing fills them in later"
END_S = 1.5  # for the last of them: a step has 4 s after SIGTERM


@dataclass(frozen=True)
class RunData:
    """What a training run has logged: its parameters and the last value of each metric."""

    experiment_id: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]


# --- runs under way


@dataclass
class LiveRun:
    """The MLflow run of something that is under way; ``run_id`` is None while MLflow is away.

    ``consequence`` says in the warning what that means.
    """

    run_id: str | None
    logged: set[tuple[str, int]] = field(default_factory=set)
    consequence: str = TRAINING

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step. What an earlier attempt of the same run has logged is not logged again."""
        fresh = {name: value for name, value in metrics.items() if (name, step) not in self.logged}
        self.logged |= {(name, step) for name in fresh}
        if fresh:
            self._send(lambda run_id: client().log_batch(run_id, metrics=_metrics(fresh, step)))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._send(lambda run_id: _set_tags(run_id, tags))

    def trained(self, digest: str) -> None:
        """Name the model that came out, so that ``register`` finds this run where no DAG run ties them together."""
        self.tag({DIGEST: digest})

    def end(self, status: str) -> None:
        """Set what became of it: FINISHED, FAILED or KILLED."""
        self._send(lambda run_id: client().set_terminated(run_id, status))

    def _send(self, call: Callable[[str], object]) -> None:
        if self.run_id is None:
            return
        try:
            call(self.run_id)
        except Exception as error:  # whatever MLflow raises: the work is worth more than its live picture
            _warn_away(error, self.consequence)
            self.run_id = None


@contextmanager
def training_run(
    experiment: str, params: Mapping[str, Any], run_id: str | None = None, inputs: Mapping[str, Path] | None = None
) -> Iterator[LiveRun]:
    """Log a training as it happens, with the system's metrics, to an earlier attempt's run or to a new one.

    The run is ``MLFLOW_RUN_ID``, else the one of the DAG run ``BALLAST_RUN``, else ``run_id`` if that still exists.
    ``inputs`` are Parquet files by context ("train"). MLflow away costs a warning, never the training: ``register``
    fills what is missing from what ``train`` wrote.
    """
    with _live(lambda: _find_run(experiment, run_id) or _dag_run(experiment), params, TRAINING, inputs) as live:
        live._send(lambda run_id: client().log_dict(run_id, environment("train", params), ENVIRONMENT))
        if links := os.environ.get("BALLAST_LINKS"):  # for the page of the Airflow task
            live._send(lambda run_id: write_json(Path(links), ids(run_id)))
        with _system_metrics(live.run_id):
            yield live


def parent_run(
    study: str, params: Mapping[str, Any], inputs: Mapping[str, Path] | None = None, experiment: str = TUNING
) -> AbstractContextManager[LiveRun]:
    """Log a tuning study; a study of this name that was begun before goes on in its run."""
    tags = {STUDY: study}
    return _live(lambda: _newest(experiment, tags) or _create_run(experiment, tags, study), params, TUNING_ON, inputs)


def child_run(
    parent_id: str | None, name: str, params: Mapping[str, Any], pruned: type[Exception] | tuple[()] = ()
) -> AbstractContextManager[LiveRun]:
    """Log a trial under the run of its study, if there is one; the exception ``pruned`` ends it as KILLED."""
    if parent_id is None:
        return nullcontext(LiveRun(None))
    return _live(lambda: _create_child(parent_id, name), params, TUNING_ON, killed=pruned)


def end_killed(child_id: str) -> None:
    """End the run of a trial whose process was killed before it could do so itself."""
    LiveRun(child_id, consequence=TUNING_ON).end("KILLED")


@contextmanager
def _live(
    begin: Callable[[], Run],
    params: Mapping[str, Any],
    consequence: str,
    inputs: Mapping[str, Path] | None = None,
    killed: type[Exception] | tuple[()] = (),
) -> Iterator[LiveRun]:
    """The run that ``begin`` finds or makes: RUNNING within, and afterwards FINISHED, FAILED or KILLED."""
    live = _begun(begin, params, consequence, inputs or {})
    status = "KILLED"  # by SystemExit or KeyboardInterrupt
    try:
        yield live
        status = "FINISHED"
    except Exception as error:
        status = "KILLED" if isinstance(error, killed) else "FAILED"
        raise
    finally:
        live.end(status)


def _begun(
    begin: Callable[[], Run], params: Mapping[str, Any], consequence: str, inputs: Mapping[str, Path]
) -> LiveRun:
    try:
        client()  # first of all: its settings count from MLflow's import on
        run = begin()
        client().update_run(run.info.run_id, status="RUNNING")
        _log_params(run, params)
        _log_inputs(run, inputs)
        return LiveRun(run.info.run_id, _history(run), consequence)
    except Exception as error:  # as in LiveRun._send
        _warn_away(error, consequence)
        return LiveRun(None)


def _warn_away(error: Exception, consequence: str) -> None:
    log.warning("MLflow does not take the metrics; %s. %s", consequence, error)


# --- which run


def _find_run(experiment: str, run_id: str | None = None, digest: str | None = None) -> Run | None:
    """The run that the environment names, else ``run_id``, else the newest that made the model ``digest``."""
    if named := os.environ.get("MLFLOW_RUN_ID"):
        return client().get_run(named)
    if tags := _dag_tags():
        return _newest(experiment, tags)
    if run_id:
        return _existing(run_id)
    return _newest(experiment, {DIGEST: digest}) if digest else None


def _existing(run_id: str) -> Run | None:
    """The run of this id; None where it was deleted, or where MLflow is another than it was."""
    from mlflow.exceptions import MlflowException

    try:
        run = client().get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _newest(experiment: str, tags: Mapping[str, str]) -> Run | None:
    return next(iter(_runs(experiment, tags)), None)


def _runs(experiment: str, tags: Mapping[str, str]) -> list[Run]:
    """The runs with these tags, the newest first."""
    found = client().get_experiment_by_name(experiment)
    if found is None:
        return []
    where = " AND ".join(f"tags.`{name}` = {_quoted(value)}" for name, value in tags.items())
    return list(client().search_runs([found.experiment_id], where, order_by=["attributes.start_time DESC"]))


def _quoted(value: str) -> str:
    """A string of MLflow's search language, which knows two quotes and no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"


def _dag_run(experiment: str) -> Run:
    """A new run; it bears the name of the DAG run, if there is one."""
    tags = _dag_tags()
    name = f"{tags['ballast.dag']} {tags['ballast.run']}" if "ballast.dag" in tags else None
    return _create_run(experiment, tags, name)


def _dag_tags() -> dict[str, str]:
    """The DAG run this process belongs to; empty on a laptop."""
    if not os.environ.get("BALLAST_RUN"):
        return {}
    names = {"ballast.run": "BALLAST_RUN", "ballast.dag": "BALLAST_DAG"}
    return {tag: os.environ[name] for tag, name in names.items() if os.environ.get(name)}


def _create_run(experiment: str, tags: Mapping[str, str], name: str | None) -> Run:
    return client().create_run(_experiment_id(experiment), tags=dict(tags), run_name=name)


def _create_child(parent_id: str, name: str) -> Run:
    experiment_id = client().get_run(parent_id).info.experiment_id
    return client().create_run(experiment_id, tags={"mlflow.parentRunId": parent_id}, run_name=name)


def _experiment_id(name: str) -> str:
    """Find or make the experiment. Without a server its artifacts lie under var/; a server has its own place."""
    from mlflow.exceptions import MlflowException

    if found := client().get_experiment_by_name(name):
        return str(found.experiment_id)
    location = (places.mlflow_artifacts() / name).as_uri() if database() else None
    try:
        return str(client().create_experiment(name, artifact_location=location))
    except MlflowException:  # another process was first
        if found := client().get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


# --- what a run holds


def _metrics(values: Mapping[str, float], step: int) -> list[Metric]:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    return [Metric(name, float(value), now, step) for name, value in values.items()]


def _history(run: Run) -> set[tuple[str, int]]:
    """The metrics and steps that a run has already; without the system's, which count for themselves."""
    names = [name for name in run.data.metrics if not name.startswith(SYSTEM)]
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


def _set_tags(run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client().log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def _log_inputs(run: Run, inputs: Mapping[str, Path]) -> None:
    """Log the files as the run's data sets, each with its context; MLflow leaves out those that the run has."""
    from mlflow.entities import DatasetInput, InputTag

    datasets = [
        DatasetInput(_dataset(path), [InputTag("mlflow.data.context", context)])
        for context, path in inputs.items()
        if path.exists()
    ]
    if datasets:
        client().log_inputs(run.info.run_id, datasets)


def _dataset(path: Path) -> Dataset:
    """A Parquet file by the MD5 of its bytes, which is DVC's name for it. Of the rows themselves nothing is read."""
    from mlflow.entities import Dataset
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    with ParquetFile(path) as parquet:
        columns = [
            {"type": _type(one.type), "name": one.name, "required": not one.nullable} for one in parquet.schema_arrow
        ]
        rows = parquet.metadata.num_rows
    return Dataset(
        name=f"{path.parent.name}/{path.name}",
        digest=md5,
        source_type="dvc",
        source=json.dumps({"path": path.as_posix(), "md5": md5}),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"num_rows": rows}),
    )


def _type(arrow: Any) -> str:
    """MLflow's name of a pyarrow type."""
    from pyarrow import types

    kinds = {
        "boolean": types.is_boolean,
        "long": types.is_int64,
        "integer": types.is_integer,
        "float": types.is_float32,
        "double": types.is_floating,
        "datetime": types.is_temporal,
    }
    return next((name for name, fits in kinds.items() if fits(arrow)), "string")


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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "image": os.environ.get("BALLAST_IMAGE"),  # the container's that this process runs in
        "uv_lock_sha256": sha256(lock) if lock.exists() else None,
    }


# --- system metrics


@contextmanager
def _system_metrics(run_id: str | None) -> Iterator[None]:
    """Log processor, memory, disk, network and, where there is one, GPU meanwhile. Trouble there costs a warning."""
    monitor = _monitor(run_id) if run_id else None
    try:
        yield
    finally:
        if monitor:  # apart, as a server that hangs would hold it for minutes
            ending = Thread(target=monitor.finish, daemon=True)
            ending.start()
            ending.join(END_S)


def _monitor(run_id: str) -> Any:
    """MLflow's monitor of this machine, started; None if it cannot be."""
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # Its own words come with every sample (a GPU that does not tell its load) or say again what we say.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        monitor: Any = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
            run_id, sampling_interval=SAMPLE_S, resume_logging=True, tracking_uri=places.tracking_uri()
        )
        monitor.monitor = _guarded(monitor.monitor)
        monitor.start()
    except Exception as error:  # whatever psutil or MLflow raises
        _warn_unmonitored(error)
        return None
    return monitor


def _guarded(watch: Callable[[], None]) -> Callable[[], None]:
    """What a thread runs, with a warning for what would end it."""

    def guarded() -> None:
        try:
            watch()
        except Exception as error:
            _warn_unmonitored(error)

    return guarded


def _warn_unmonitored(error: Exception) -> None:
    log.warning("No system metrics from here on; training goes on. %s: %s", type(error).__name__, error)


# --- runs as register fills them


@dataclass(frozen=True)
class Evidence:
    """What ``register`` puts with a training run: what is known of a model besides the model itself."""

    params: Mapping[str, Any]
    history: Mapping[int, Mapping[str, float]]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    inputs: Mapping[str, Path]
    """Parquet files by context; as with ``files``, one that is not there is left out."""
    files: Sequence[tuple[Path, str]]
    """Files and folders, each with the name of the artifact folder it goes to; one that is not there is left out."""


def complete_run(experiment: str, digest: str, evidence: Evidence) -> str:
    """Find the run that trained the model ``digest`` (or make it: its training was cached) and fill what it lacks."""
    with speaking():
        run = _find_run(experiment, digest=digest) or _dag_run(experiment)
        run_id = str(run.info.run_id)
        _log_params(run, evidence.params)
        _log_inputs(run, evidence.inputs)
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
        _set_tags(run_id, {**evidence.tags, DIGEST: digest})
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


# --- runs afterwards


def run_data(run_id: str) -> RunData:
    """What a training run has logged."""
    with speaking():
        run = client().get_run(run_id)
        return RunData(str(run.info.experiment_id), dict(run.data.params), dict(run.data.metrics))


def ids(run_id: str) -> dict[str, str]:
    """The ids of the run and its experiment: what its page in MLflow is found by."""
    return {"run_id": run_id, "experiment_id": run_data(run_id).experiment_id}


def attach(run_id: str, path: Path, under: str) -> dict[str, str]:
    """Put a file or folder with the run; return its ``ids``."""
    with speaking():
        _log_path(run_id, path, under)
    return ids(run_id)


def attached(run_id: str, under: str) -> bytes | None:
    """The bytes of an artifact of the run; None if there is none of this name."""
    with speaking():
        return _artifact(run_id, under) if _has_artifact(run_id, under) else None


def _has_artifact(run_id: str, path: str) -> bool:
    folder = path.rpartition("/")[0]
    return any(item.path == path for item in client().list_artifacts(run_id, folder or None))


def _artifact(run_id: str, path: str) -> bytes:
    with TemporaryDirectory() as scratch:
        return Path(client().download_artifacts(run_id, path, scratch)).read_bytes()


def _log_path(run_id: str, path: Path, under: str) -> None:
    if path.is_dir():
        client().log_artifacts(run_id, str(path), under)
    else:
        client().log_artifact(run_id, str(path), under or None)


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
    if file := database():
        with locked(file):  # MLflow's first use migrates the file, and two migrations at once break each other
            if not file.exists():
                with whole_file(file) as part:  # killed amid its first migrations, it could not be used again
                    mlflow.MlflowClient(f"sqlite:///{part}")
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


def database() -> Path | None:
    """The SQLite file, where MLflow is one."""
    uri = places.tracking_uri()
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


@contextmanager
def speaking() -> Iterator[None]:
    """Turn what MLflow raises into what a person can act on: TryAgain where the server failed."""
    client()  # first of all, as in _begun
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
