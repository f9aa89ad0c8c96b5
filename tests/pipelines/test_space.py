"""What a search space may say, and what is said of what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pipelines import space
from pipelines.baseline import HgbParams
from pipelines.errors import ParamsError
from pipelines.fit import TrainParams
from pipelines.params import load
from pipelines.tune import SPACE

PRESENT = HgbParams(iterations=20, patience=5, learning_rate=0.1, max_leaf_nodes=31)


def axes(folder: Path, **settings: Any) -> dict[str, space.Axis]:
    (folder / "space.yaml").write_text(yaml.safe_dump({"hgb": settings}))
    return space.read(folder / "space.yaml", "hgb", PRESENT)


@pytest.mark.parametrize("kind", space.KINDS)
def test_shipped_space_as_written_holds_the_shipped_params(kind: Any) -> None:
    params = load(Path(__file__).resolve().parents[2] / "params.yaml", "train", TrainParams)
    written = space.read(SPACE, kind, getattr(params, kind))
    assert space.widened(written, getattr(params, kind)) == written


def test_axes_become_distributions_in_the_type_of_the_setting(tmp_path: Path) -> None:
    found = axes(
        tmp_path,
        learning_rate={"low": "1e-3", "high": 1, "log": True},
        max_leaf_nodes={"low": 7, "high": 35, "step": 8},
        iterations={"choices": [10, 20]},
    )
    assert found["learning_rate"].distribution() == FloatDistribution(0.001, 1.0, log=True)
    assert found["max_leaf_nodes"].distribution() == IntDistribution(7, 31, step=8)
    assert found["iterations"].distribution() == CategoricalDistribution([10, 20])


@pytest.mark.parametrize(
    ("setting", "axis", "points"),
    [
        ("max_leaf_nodes", {"choices": [4, 8]}, [4, 8, 31]),
        ("max_leaf_nodes", {"low": 4, "high": 8, "step": 4}, [4, 8, 31]),
        ("max_leaf_nodes", {"low": 27, "high": 33, "step": 2}, [27, 29, 31, 33]),
        ("learning_rate", {"low": 0.1, "high": 0.3, "step": 0.1}, [0.1, 0.2, 0.3]),
    ],
)
def test_points_hold_the_present_value(tmp_path: Path, setting: str, axis: Any, points: Any) -> None:
    assert space.widened(axes(tmp_path, **{setting: axis}), PRESENT)[setting].points() == points


def test_range_is_widened_to_the_present_value(tmp_path: Path) -> None:
    written = axes(tmp_path, learning_rate={"low": 0.2, "high": 0.3})
    assert written["learning_rate"].low == 0.2
    axis = space.widened(written, PRESENT)["learning_rate"]
    assert (axis.low, axis.high, axis.points()) == (0.1, 0.3, None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learing_rate": {"low": 1, "high": 2}}, "`hgb.learing_rate` is not a setting; did you mean `hgb.learning_"),
        ({"learning_rate": {"low": 1, "hihg": 2}}, "`hihg` is not known; an axis has choices, low, high, step, log"),
        ({"learning_rate": {"low": 1}}, "`hgb.learning_rate`: give `choices`, or `low` and `high`"),
        ({"learning_rate": {"low": 2, "high": 1}}, "`low` must be below `high` (found 2 and 1)"),
        ({"learning_rate": {"low": "a", "high": 1}}, "(found 'a')"),
        ({"learning_rate": {"low": 0, "high": 1, "log": True}}, "a `log` axis starts above 0"),
        ({"learning_rate": {"choices": [1], "high": 1}}, "either `choices`, or `low` and `high`"),
        ({"learning_rate": {"choices": []}}, "`choices` must name one value at least"),
        ({"learning_rate": {"low": 0.0, "high": 1}}, "takes no 0.0: Input should be greater than 0"),
        ({"learning_rate": {"choices": [0.1, -1]}}, "takes no -1: Input should be greater than 0"),
        ({"max_leaf_nodes": {"low": 1, "high": 8}}, "takes no 1: Input should be greater than or equal to 2"),
        ({"max_leaf_nodes": {"low": 2.5, "high": 8}}, "takes no 2.5: Input should be a valid integer"),
        ({"max_leaf_nodes": {"low": 2, "high": 8, "step": 0.5}}, "`step` is not (found 0.5)"),
        ({"max_leaf_nodes": 3}, "`hgb.max_leaf_nodes`: Input should be a valid dictionary"),
        ({}, "has no axes for `hgb`"),
    ],
)
def test_space_that_says_nonsense_is_refused(tmp_path: Path, settings: Any, said: str) -> None:
    with pytest.raises(ParamsError) as error:
        axes(tmp_path, **settings)
    assert said in str(error.value)


def test_space_of_an_unknown_kind_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("hbg: {}")
    with pytest.raises(ParamsError, match="`hbg` is not a kind; did you mean `hgb`"):
        space.read(tmp_path / "space.yaml", "hgb", PRESENT)
    with pytest.raises(ParamsError, match="There is no search space"):
        space.read(tmp_path / "none.yaml", "hgb", PRESENT)


def test_grid_is_every_point_and_wants_points(tmp_path: Path) -> None:
    found = axes(tmp_path, iterations={"choices": [10, 20]}, learning_rate={"low": 0.1, "high": 0.3, "step": 0.2})
    assert space.grid(found) == [
        {"iterations": 10, "learning_rate": 0.1},
        {"iterations": 10, "learning_rate": 0.3},
        {"iterations": 20, "learning_rate": 0.1},
        {"iterations": 20, "learning_rate": 0.3},
    ]
    with pytest.raises(ParamsError, match=r"needs `choices` or a `step` .*lacking: learning_rate"):
        space.grid(axes(tmp_path, learning_rate={"low": 0.1, "high": 0.3}))


def test_drawn_numbers_are_short_and_stay_within(tmp_path: Path) -> None:
    found = axes(tmp_path, learning_rate={"low": 0.01234, "high": 1.0}, iterations={"low": 1, "high": 2000})
    drawn = space.drawn(found, {"learning_rate": 0.345678, "iterations": 1234})
    assert drawn == {"learning_rate": 0.346, "iterations": 1234}
    assert space.drawn(found, {"learning_rate": 0.01234, "iterations": 1})["learning_rate"] == 0.01234
