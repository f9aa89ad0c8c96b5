"""The registered versions in MLflow, the aliases that point to them, and their models in a folder each.

The one registered model of a project is ``register.model`` of params.yaml. Runs, and the connection to MLflow, are
tracking.py's.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sqlite3
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines import params, places, tracking
from pipelines.errors import BallastError, TryAgain
from pipelines.files import locked, whole_folder
from pipelines.schema import Features
from pipelines.tracking import DIGEST, client, database, speaking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model, ModelSignature

LOCK = "ballast.lock"
COLLECTED = "ballast.collected"  # when `ballast gc` removed the artifacts of a refused version
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
    with speaking(), locked(places.var() / "mlflow" / "register"):
        for known in versions():
            if (known.digest, known.lock) == (digest, lock) and COLLECTED not in known.tags:
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
    with speaking():
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


def whole(number: int) -> Version:
    """One version whose model is there; raise BallastError if `ballast gc` has removed it."""
    found = version(number)
    if when := found.tags.get(COLLECTED):
        raise BallastError(
            f"The model of v{number} is gone: the gate had refused it, and `ballast gc` removed it on {when[:10]}. "
            "Train again; an equal model is registered as a new version."
        )
    return found


def _version(found: ModelVersion) -> Version:
    tags = dict(found.tags)
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return Version(int(found.version), tags.get(DIGEST, ""), tags.get(LOCK, ""), found.run_id or "", created, tags)


def set_tags(number: int, tags: Mapping[str, str]) -> None:
    """Set tags of a version."""
    with speaking():
        for tag, value in tags.items():
            client().set_model_version_tag(name(), str(number), tag, value)


def measure(number: int, metric: str, value: float) -> None:
    """Add a point to a metric of a version's training run."""
    with speaking():
        client().log_metric(version(number).run_id, metric, value)


def model(number: int) -> Path:
    """The model folder of a version, fetched once and verified each time.

    Raises BallastError if the registry holds another model than the one that was registered under this number.
    """
    wanted = whole(number)
    folder = places.var() / "models" / wanted.digest
    with speaking(), locked(folder):
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


def attach(number: int, path: Path, under: str) -> dict[str, str]:
    """Put a file or folder with the training run of a version; return the ids of that run and its experiment."""
    return tracking.attach(version(number).run_id, path, under)


def attached(number: int, under: str) -> bytes | None:
    """The bytes of an artifact of a version's training run; None if there is none of this name."""
    return tracking.attached(version(number).run_id, under)


def kept(version: Version, under: str) -> bytes | None:
    """The bytes of a file of the version's own ``records``, else of its run: there alone older versions have theirs."""
    own = tracking.attached(version.run_id, f"{records(version.lock)}/{under}")
    return tracking.attached(version.run_id, under) if own is None else own


def records(lock: str) -> str:
    """The artifact folder of what was made under one dvc.lock: two versions of the same model may share a run."""
    return f"records/{lock[:12]}"


# --- what is no longer needed


def size(number: int) -> int:
    """The bytes of a version's artifacts in MLflow; 0 where they are gone."""
    with speaking():
        store, waiting, total = _artifacts(number), [""], 0
        while waiting:
            for found in store.list_artifacts(waiting.pop() or None):
                if found.is_dir:
                    waiting.append(found.path)
                total += found.file_size or 0
    return total


def collect(number: int) -> None:
    """Remove a version's model from MLflow; its tags and its run's records stay. The mark comes first."""
    with speaking(), locked(places.var() / "mlflow" / "register"):
        if COLLECTED not in version(number).tags:
            set_tags(number, {COLLECTED: datetime.now(UTC).isoformat(timespec="seconds")})
        store = _artifacts(number)
        for found in store.list_artifacts():
            store.delete_artifacts(found.path)


def _artifacts(number: int) -> Any:
    """MLflow's store of a version's artifacts."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(client().get_model_version_download_uri(name(), str(number)))


# --- aliases


def aliases() -> dict[str, int]:
    """The aliases of the registered model and the versions they point to.

    Read straight from the SQLite file where there is no server: a look should not cost MLflow's import.
    """
    if file := database():
        if not file.exists():
            return {}
        query = "SELECT alias, version FROM registered_model_aliases WHERE name = ?"
        try:
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30)) as connection:
                return {alias: int(number) for alias, number in connection.execute(query, [name()])}
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # the server is just making its tables
                return {}
            raise TryAgain(f"MLflow's database {file} cannot be read now ({error}). Try again.") from None
        except sqlite3.DatabaseError as error:
            raise BallastError(f"MLflow's database {file} is damaged: {error}. Put it back from a backup.") from None
    with speaking():
        found = client().search_registered_models(f"name = '{name()}'")
        return {alias: int(number) for model in found for alias, number in model.aliases.items()}


def project(champion: int | None, previous: int | None) -> None:
    """Make the aliases ``champion`` and ``previous`` say what the ledger says. Doing it again changes nothing."""
    with speaking():
        for alias, number in {"champion": champion, "previous": previous}.items():
            if number is None:
                client().delete_registered_model_alias(name(), alias)
            else:
                client().set_registered_model_alias(name(), alias, str(number))
