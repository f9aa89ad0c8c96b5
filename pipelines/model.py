"""A trained model: a folder that holds all that its predictions need, and one ``load`` and ``predict`` for raw rows.

    network.pt2        the network by torch.export, or model.skops a baseline: one float32 matrix in, probability out
    transform.json     how the rows' columns become that matrix, fitted on the train window
    schema.json        what prepare declared: as-of date, features, tables, windows; and what train found: the kind, the
                       temperature, whether it was refitted, the features' importance
    prepare.sql        the SQL that made the rows, and makes them again
    manifest.json      the SHA-256 of each of these; the digest of the model is the hash of its list

Loading checks the manifest before it parses anything and runs no code from the folder; nothing in it is a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pipelines.errors import BallastError, DataRejected
from pipelines.files import canonical_json, whole_folder, write_json
from pipelines.schema import Features, Table

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["tabm", "hgb", "logistic"]
Matrix = npt.NDArray[np.float32]
Probabilities = npt.NDArray[np.float64]

WEIGHTS: dict[Kind, str] = {"tabm": "network.pt2", "hgb": "model.skops", "logistic": "model.skops"}
MANIFEST = "manifest.json"


# --- rows to matrix ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Numeric:
    """A number, standardised by what the train window showed."""

    name: str
    mean: float
    std: float


@dataclass(frozen=True)
class Categorical:
    """A string; its code is 1 + its place in the vocabulary, and 0 if it is missing or not there."""

    name: str
    vocabulary: tuple[str, ...]


@dataclass(frozen=True)
class Transform:
    """How a row's columns become a row of the input matrix: numeric columns first."""

    numeric: tuple[Numeric, ...]
    categorical: tuple[Categorical, ...]
    dropped: Mapping[str, str]
    """Features that training left out, each with the reason."""

    @classmethod
    def fit(cls, frame: pd.DataFrame, features: Features) -> Transform:
        """Learn the transform from the train window; raise DataRejected where nothing can be learnt from a column."""
        dropped = {name: reason for name in features.names if (reason := _useless(_column(frame, name)))}
        if len(dropped) == len(features.names):
            raise DataRejected(f"No feature is left to train on ({dropped}). See prepare.sql and the windows.")
        return cls(
            numeric=tuple(_fit_numeric(frame, name) for name in features.numeric if name not in dropped),
            categorical=tuple(_fit_categorical(frame, name) for name in features.categorical if name not in dropped),
            dropped=dropped,
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Transform:
        """The transform that transform.json describes."""
        return cls(
            numeric=tuple(Numeric(**column) for column in value["numeric"]),
            categorical=tuple(Categorical(c["name"], tuple(c["vocabulary"])) for c in value["categorical"]),
            dropped=value["dropped"],
        )

    @property
    def features(self) -> Features:
        """The columns that are read."""
        return Features(numeric=[c.name for c in self.numeric], categorical=[c.name for c in self.categorical])

    def encode(self, frame: pd.DataFrame) -> Matrix:
        """The matrix (rows, columns) of a frame in any row order, NaN where a number is missing."""
        import pandas as pd

        matrix = np.empty((len(frame), len(self.features.names)), dtype=np.float32)
        with np.errstate(over="ignore"):
            for place, number in enumerate(self.numeric):
                matrix[:, place] = (_numbers(frame, number.name) - number.mean) / number.std
        for place, text in enumerate(self.categorical, start=len(self.numeric)):
            vocabulary = pd.Index(text.vocabulary, dtype="str")
            matrix[:, place] = vocabulary.get_indexer(pd.Index(_strings(frame, text.name))) + 1
        return matrix


def _column(frame: pd.DataFrame, name: str) -> pd.Series[Any]:
    if name not in frame:
        raise BallastError(
            f"The rows have no column `{name}`, which the model reads (found {', '.join(map(str, frame.columns))}). "
            "Make them with the model's own prepare.sql."
        )
    return frame[name]


def _numbers(frame: pd.DataFrame, name: str) -> npt.NDArray[np.float64]:
    column = _column(frame, name)
    try:
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise BallastError(f"Column `{name}` must hold numbers ({error}). Cast it in prepare.sql.") from None


def _strings(frame: pd.DataFrame, name: str) -> pd.Series[Any]:
    from pandas.api.types import is_numeric_dtype

    column = _column(frame, name)
    if is_numeric_dtype(column) and column.notna().any():
        raise BallastError(
            f"Column `{name}` must hold strings (found {column.dtype}). Cast it to VARCHAR in prepare.sql, "
            "or declare it among the numeric features."
        )
    return column.astype("str")


def _useless(column: pd.Series[Any]) -> str:
    values = column.drop_duplicates()
    if len(values) > 1:
        return ""
    return "all null" if values.isna().all() else f"always {values.iloc[0]}"


def _fit_numeric(frame: pd.DataFrame, name: str) -> Numeric:
    values = _numbers(frame, name)
    # One value and nulls: a standard deviation of 0, yet being null may tell something.
    return Numeric(name, float(np.nanmean(values)), float(np.nanstd(values)) or 1.0)


def _fit_categorical(frame: pd.DataFrame, name: str) -> Categorical:
    return Categorical(name, tuple(sorted(_strings(frame, name).dropna().unique())))


# --- calibration ------------------------------------------------------------------------------------------------------


def tempered(probability: Probabilities, temperature: float) -> Probabilities:
    """Probabilities with their log odds divided by ``temperature``: above 1 they become less sure, below 1 surer.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), https://arxiv.org/abs/1706.04599.
    """
    from scipy.special import expit, logit

    if temperature == 1.0:
        return probability
    scaled: Probabilities = expit(logit(probability) / temperature)
    return scaled


# --- the folder -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model as it was loaded; ``digest`` tells it from every other."""

    digest: str
    kind: Kind
    schema: Mapping[str, Any]
    sql: str
    transform: Transform
    classify: Callable[[Matrix], Probabilities]
    size: int
    """Bytes of its files."""

    @property
    def features(self) -> Features:
        """The columns that the model reads."""
        return self.transform.features

    @property
    def temperature(self) -> float:
        """What the model's log odds are divided by; 1 leaves them as they are."""
        return float(self.schema.get("temperature", 1.0))

    def predict(self, frame: pd.DataFrame) -> Probabilities:
        """The probability of label 1, (rows,), in the order of the rows.

        Takes the feature columns as the model's SQL gives them: strings, None and NaN, values never seen before;
        other columns are ignored. Raises BallastError if a column is missing or infinite, or a row gets no number.
        """
        matrix = self.transform.encode(frame)
        columns = zip(self.features.names, matrix.T, strict=True)
        if infinite := [name for name, values in columns if np.isinf(values).any()]:
            raise BallastError(f"Infinite values in {', '.join(infinite)}: they give no probability. Guard the SQL.")
        probability = self.classify(matrix) if len(matrix) else np.empty(0)
        if wrong := int(np.isnan(probability).sum()):
            raise BallastError(f"The model gives no probability for {wrong} of {len(frame)} rows. Train another.")
        return tempered(probability, self.temperature)

    def prepare(self, tables: Path, quarantine: Path | None) -> pd.DataFrame:
        """The rows that the model's own SQL makes of the tables as they are now (see ``rows.select``)."""
        from pipelines import rows

        declared = {name: Table.model_validate(table) for name, table in self.schema["tables"].items()}
        return rows.select(tables, quarantine, self.sql, declared)


def save(folder: Path, kind: Kind, weights: bytes, transform: Transform, schema: Mapping[str, Any], sql: bytes) -> None:
    """Write a model folder, whole; equal models give equal bytes."""
    with whole_folder(folder) as part:
        (part / WEIGHTS[kind]).write_bytes(weights)
        write_json(part / "transform.json", asdict(transform))
        write_json(part / "schema.json", {**schema, "kind": kind})
        (part / "prepare.sql").write_bytes(sql)
        hashes = {file.name: sha256(file.read_bytes()).hexdigest() for file in sorted(part.iterdir())}
        write_json(part / MANIFEST, {"files": hashes})


def load(folder: Path) -> Model:
    """Load a model; raise BallastError if a file is missing, changed, not in its manifest or no part of a model."""
    files, digest = _verified(folder)
    schema = json.loads(files.get("schema.json", b"{}"))
    kind: Kind = schema.get("kind")
    if odd := sorted(set(files) ^ {WEIGHTS.get(kind, "weights"), "transform.json", "schema.json", "prepare.sql"}):
        raise BallastError(
            f"{folder} is no model of ours: {', '.join(odd)} missing, or not part of one. Take it again."
        )
    return Model(
        digest=digest,
        kind=kind,
        schema=schema,
        sql=files["prepare.sql"].decode(),
        transform=Transform.from_json(json.loads(files["transform.json"])),
        classify=_loads(kind, files[WEIGHTS[kind]]),
        size=sum(map(len, files.values())),
    )


def _loads(kind: Kind, weights: bytes) -> Callable[[Matrix], Probabilities]:
    # Torch and scikit-learn take seconds to import: only the one that the model needs.
    if kind == "tabm":
        from pipelines import network

        return network.loads(weights)
    from pipelines import baseline

    return baseline.loads(weights)


def _verified(folder: Path) -> tuple[dict[str, bytes], str]:
    """The bytes of the model's files, each of them checked, and the digest. What was checked is what is used."""
    if not (folder / MANIFEST).is_file():
        raise BallastError(f"{folder} is no model: it has no {MANIFEST}. Train one, or see the path.")
    hashes = json.loads((folder / MANIFEST).read_bytes())["files"]
    found = {path.name: path for path in folder.iterdir() if path.name != MANIFEST}
    if odd := sorted(set(found) ^ set(hashes)):
        raise BallastError(f"The files in {folder} are not those of its {MANIFEST} (differing: {', '.join(odd)}).")
    if linked := sorted(name for name, path in found.items() if path.is_symlink() or not path.is_file()):
        raise BallastError(f"{folder} must hold plain files (found otherwise: {', '.join(linked)}).")
    files = {name: path.read_bytes() for name, path in found.items()}
    if changed := sorted(name for name, content in files.items() if sha256(content).hexdigest() != hashes[name]):
        raise BallastError(f"Changed since the model was written: {', '.join(changed)} in {folder}. Take it again.")
    return files, sha256(canonical_json(hashes).encode()).hexdigest()


def _load_pyfunc(path: str) -> Model:
    """What mlflow.pyfunc calls: ``mlflow.pyfunc.load_model(...).predict(frame)`` is ``Model.predict``."""
    return load(Path(path))
