"""The baselines, of scikit-learn, on the network's input matrix: HistGradientBoosting and logistic regression.

Both become a skops archive and come back from it; see ``dumps`` and ``loads``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipelines import archive
from pipelines.errors import BallastError
from pipelines.params import Params

MAX_CODES = 255  # scikit-learn takes no categorical column with more


class HgbParams(Params):
    """Section `train.hgb`."""

    iterations: int = Field(ge=1)
    patience: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    max_leaf_nodes: int = Field(ge=2)


class LogisticParams(Params):
    """Section `train.logistic`."""

    iterations: int = Field(ge=1)
    inverse_penalty: float = Field(gt=0)


Rows = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]  # matrix (rows, columns), label (rows,)


def fit_hgb(train: Rows, validation: Rows | None, categories: Mapping[int, int], params: HgbParams, seed: int) -> Any:
    """Fit a HistGradientBoostingClassifier; boosting ends when validation stops getting better, or else at the last.

    ``categories`` has the number of codes of each categorical column. One with too many for scikit-learn is taken
    as a number: its codes are in alphabetical order, which is poor but no error.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    classifier = HistGradientBoostingClassifier(
        max_iter=params.iterations,
        learning_rate=params.learning_rate,
        max_leaf_nodes=params.max_leaf_nodes,
        categorical_features=[column for column, codes in categories.items() if codes <= MAX_CODES] or None,
        early_stopping=validation is not None,
        n_iter_no_change=params.patience,
        scoring="loss",
        tol=0.0,
        random_state=seed,
    )
    if validation is None:
        return classifier.fit(*train)
    return classifier.fit(*train, X_val=validation[0], y_val=validation[1])


def best_iteration(classifier: Any) -> int:
    """The iteration with the least validation loss; without a validation window, the last."""
    scores = classifier.validation_score_
    return int(np.argmax(scores)) if len(scores) else int(classifier.n_iter_)


def fit_logistic(train: Rows, categories: Mapping[int, int], params: LogisticParams, seed: int) -> Any:
    """Fit a logistic regression: numbers as they are, 0 and an indicator where one is missing, codes as indicators."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder

    codes = list(categories)
    numbers = [column for column in range(train[0].shape[1]) if column not in categories]
    known = SimpleImputer(strategy="constant", fill_value=0.0, add_indicator=True, keep_empty_features=True)
    indicators = OneHotEncoder(handle_unknown="ignore")
    pipeline = Pipeline(
        [
            ("inputs", ColumnTransformer([("numbers", known, numbers), ("codes", indicators, codes)])),
            ("regression", LogisticRegression(C=params.inverse_penalty, max_iter=params.iterations, random_state=seed)),
        ]
    )
    return pipeline.fit(*train)


# --- as a file --------------------------------------------------------------------------------------------------------

TRUSTED = [
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",  # its content is checked below
    "functools.partial",  # these two pass the numeric columns through unchanged
    "sklearn.utils.validation.check_array",
    "numpy.dtype",  # of the inputs of a logistic regression; read from an empty array
]
"""The types in the file that skops does not trust by itself."""

_ADDRESS = re.compile(rb'(?<="__id__": )\d+|(?<="file": ")\d+(?=\.npy")')


def dumps(classifier: Any) -> bytes:
    """The classifier as a skops archive; equal classifiers give equal bytes."""
    from skops.io import dumps

    members = archive.unpack(dumps(classifier))
    numbers: dict[bytes, bytes] = {}  # skops names objects by their address in memory: number them instead

    def number(address: re.Match[bytes]) -> bytes:
        return numbers.setdefault(address[0], b"%d" % (len(numbers) + 1))

    schema = _ADDRESS.sub(number, members.pop("schema.json"))
    arrays = {f"{numbers[name.removesuffix('.npy').encode()].decode()}.npy": members[name] for name in members}
    return archive.pack({"schema.json": schema, **arrays})


def loads(data: bytes) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]:
    """The function from matrix to probability that ``dumps`` wrote; raise BallastError for any other content."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import Pipeline
    from skops.io import loads
    from skops.io.exceptions import UntrustedTypesFoundException

    try:
        classifier = loads(archive.pack(archive.unpack(data)), trusted=TRUSTED)
    except UntrustedTypesFoundException as error:
        raise BallastError(f"model.skops is not loaded: {error}. Take the model from its source again.") from None
    if type(classifier) is HistGradientBoostingClassifier:
        _check_trees(classifier)
    elif type(classifier) is Pipeline:
        _check_steps(classifier)
    else:
        raise BallastError(
            f"model.skops must hold a HistGradientBoostingClassifier or a Pipeline (found {type(classifier)})."
        )
    return lambda matrix: probability(classifier, matrix)


def probability(classifier: Any, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The probability of label 1, (rows,)."""
    both: npt.NDArray[np.float64] = classifier.predict_proba(matrix)
    return both[:, 1]


def _check_trees(classifier: Any) -> None:
    """scikit-learn follows a tree's indices unchecked: a wrong one would read beyond its arrays, or never end."""
    from sklearn.compose import ColumnTransformer
    from sklearn.preprocessing import FunctionTransformer, OrdinalEncoder

    known = classifier._bin_mapper.is_categorical_
    before = classifier._preprocessor  # brings the categorical columns to the front
    parts = [] if before is None else [type(part[1]) for part in before.transformers_]
    if len(known) != classifier.n_features_in_ or not (before is None or type(before) is ColumnTransformer):
        raise BallastError("model.skops holds trees for other columns than it says. Take the model again.")
    if not set(parts) <= {FunctionTransformer, OrdinalEncoder, str}:
        raise BallastError(f"model.skops holds other steps before its trees (found {parts}). Take the model again.")
    for tree in (tree for iteration in classifier._predictors for tree in iteration):
        above = np.flatnonzero(tree.nodes["is_leaf"] == 0)
        inner = tree.nodes[above]
        below = np.column_stack([inner["left"], inner["right"]])
        bitset = inner["bitset_idx"][inner["is_categorical"] == 1]
        sound = [
            len(tree.nodes) > 0,
            ((below > above[:, None]) & (below < len(tree.nodes))).all(),
            ((inner["feature_idx"] >= 0) & (inner["feature_idx"] < classifier.n_features_in_)).all(),
            (bitset < len(tree.raw_left_cat_bitsets)).all(),
        ]
        if not all(sound):
            raise BallastError("model.skops holds a tree with an index out of range. Take the model again.")


def _check_steps(pipeline: Any) -> None:
    """skops trusts every class of scikit-learn; only those that ``fit_logistic`` puts together are taken."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import MissingIndicator, SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import OneHotEncoder

    steps = [type(step) for _, step in pipeline.steps]
    found = [part[1] for part in pipeline.steps[0][1].transformers_] if ColumnTransformer in steps[:1] else []
    within = [part.indicator_ for part in found if type(part) is SimpleImputer]
    parts = {type(part) for part in (*found, *within)}
    if steps != [ColumnTransformer, LogisticRegression] or not parts <= {
        SimpleImputer,
        MissingIndicator,
        OneHotEncoder,
    }:
        raise BallastError(f"model.skops holds a pipeline of other steps (found {steps} of {parts}). Take it again.")
