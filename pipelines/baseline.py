"""The baseline: scikit-learn's HistGradientBoosting on the network's input matrix; how it becomes a file, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
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


def fit(
    train: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
    validation: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
    categories: dict[int, int],
    params: HgbParams,
    seed: int,
) -> Any:
    """Fit a HistGradientBoostingClassifier to (matrix, label); boosting ends when validation stops getting better.

    ``categories`` has the number of codes of each categorical column. One with too many for scikit-learn is taken
    as a number: its codes are in alphabetical order, which is poor but no error.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    classifier = HistGradientBoostingClassifier(
        max_iter=params.iterations,
        learning_rate=params.learning_rate,
        max_leaf_nodes=params.max_leaf_nodes,
        categorical_features=[column for column, codes in categories.items() if codes <= MAX_CODES] or None,
        early_stopping=True,
        n_iter_no_change=params.patience,
        scoring="loss",
        tol=0.0,
        random_state=seed,
    )
    return classifier.fit(*train, X_val=validation[0], y_val=validation[1])


# --- as a file --------------------------------------------------------------------------------------------------------

TRUSTED = [
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",  # its content is checked below
    "functools.partial",  # these two pass the numeric columns through unchanged
    "sklearn.utils.validation.check_array",
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
    from skops.io import loads
    from skops.io.exceptions import UntrustedTypesFoundException

    try:
        classifier = loads(archive.pack(archive.unpack(data)), trusted=TRUSTED)
    except UntrustedTypesFoundException as error:
        raise BallastError(f"model.skops is not loaded: {error}. Take the model from its source again.") from None
    if type(classifier) is not HistGradientBoostingClassifier:
        raise BallastError(f"model.skops must hold a HistGradientBoostingClassifier (found {type(classifier)}).")
    _check_trees(classifier)

    def probability(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        both: npt.NDArray[np.float64] = classifier.predict_proba(matrix)
        return both[:, 1]

    return probability


def _check_trees(classifier: Any) -> None:
    """scikit-learn follows a tree's indices unchecked: a wrong one would read beyond its arrays, or never end."""
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
