"""The search space of `ballast tune`: which settings of a kind are tried, and between which values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import yaml
from pydantic import ValidationError, model_validator

from pipelines.errors import ParamsError
from pipelines.model import Kind
from pipelines.params import Params

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

KINDS: tuple[Kind, ...] = get_args(Kind)
Value = bool | int | float | str
Axes = Mapping[str, "Axis"]
DIGITS = 3  # significant ones of a drawn number: what is measured is what a person will read in params.yaml


class Axis(Params):
    """What one setting may be: one of ``choices``; or from ``low`` to ``high``, by its logarithm or in steps."""

    choices: list[Value] | None = None
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _is_list_or_range(self) -> Self:
        if self.choices is not None:
            if {"low", "high", "step", "log"} & self.model_fields_set:
                raise ValueError("give either `choices`, or `low` and `high`")
            if not self.choices or len(set(self.choices)) < len(self.choices):
                raise ValueError("`choices` must name one value at least, and none twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give `choices`, or `low` and `high`")
        if not self.low < self.high:
            raise ValueError(f"`low` must be below `high` (found {self.low} and {self.high})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a `log` axis starts above 0, and has no `step`")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"`step` must be above 0 (found {self.step})")
        return self

    def points(self) -> list[Value] | None:
        """Every value that there is; None where they cannot be counted."""
        if self.choices is not None or self.step is None:
            return self.choices
        assert self.low is not None and self.high is not None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [_short(self.low + number * self.step, 12) for number in range(count)]

    def distribution(self) -> BaseDistribution:
        """The axis as Optuna has it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        assert self.low is not None and self.high is not None
        points = self.points()
        low, high = self.low, points[-1] if points else self.high
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=self.log, step=int(self.step or 1))
        return FloatDistribution(low, float(high), log=self.log, step=self.step)


def read(path: Path, kind: Kind, present: Params) -> dict[str, Axis]:
    """Read the axes of a kind from ``path``, as they are written, in the types of the ``present`` settings.

    Raises ParamsError for what is no setting, and for a value that the setting itself would not take.
    """
    spaces = _load(path)
    _check_names(path, "", spaces, KINDS)
    if not (wanted := spaces.get(kind)):
        raise ParamsError(f"{path} has no axes for `{kind}` (found {', '.join(spaces) or 'nothing'}). Add some.")
    _check_names(path, f"{kind}.", wanted, type(present).model_fields)
    return {name: _axis(f"{path}: `{kind}.{name}`", name, value, present) for name, value in wanted.items()}


def _load(path: Path) -> dict[str, Any]:
    try:
        spaces = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"There is no search space {path}. pipelines/tune.yaml shows what one looks like.") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {error}") from None
    if not isinstance(spaces, dict) or not all(isinstance(axes, dict) for axes in spaces.values()):
        raise ParamsError(f"{path} must hold axes by kind and setting. pipelines/tune.yaml shows what that looks like.")
    return spaces


def _check_names(path: Path, where: str, found: Iterable[str], known: Iterable[str]) -> None:
    for name in found:
        if name not in known:
            near = get_close_matches(str(name), known := list(known), n=1)
            remedy = f"did you mean `{where}{near[0]}`?" if near else f"known here: {', '.join(sorted(known))}"
            raise ParamsError(f"{path}: `{where}{name}` is not {'a setting' if where else 'a kind'}; {remedy}")


def _axis(where: str, name: str, value: Any, present: Params) -> Axis:
    try:
        axis = Axis.model_validate(value)
    except ValidationError as error:
        raise ParamsError(f"{where}: {'; '.join(map(_words, error.errors()))}") from None
    typed: dict[str, Any]
    if axis.choices is not None:
        typed = {"choices": [_accepted(where, name, choice, present) for choice in axis.choices]}
    else:
        typed = {bound: _accepted(where, name, getattr(axis, bound), present) for bound in ("low", "high")}
        if type(typed["low"]) not in (int, float):
            raise ParamsError(f"{where}: the setting is no number. Give `choices`.")
        if axis.step is not None and isinstance(typed["low"], int):
            if axis.step != int(axis.step):
                raise ParamsError(f"{where}: the setting is a whole number, `step` is not (found {axis.step}).")
            typed["step"] = int(axis.step)
    return axis.model_copy(update=typed)


def _words(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return f"`{error['loc'][-1]}` is not known; an axis has {', '.join(Axis.model_fields)}"
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"`{error['loc'][0]}`: {said} (found {error['input']!r})" if error["loc"] else said


def _accepted(where: str, name: str, value: Any, present: Params) -> Any:
    """The value as the setting takes it, in its own type; raise ParamsError if it does not."""
    try:
        return getattr(type(present).model_validate({**present.model_dump(), name: value}), name)
    except ValidationError as error:
        [detail] = error.errors()[:1]
        raise ParamsError(f"{where}: the setting takes no {value!r}: {detail['msg']}") from None


def widened(axes: Axes, present: Params) -> dict[str, Axis]:
    """The axes, each widened to hold the present value: the search must be able to stay where it is."""
    return {name: _holding(name, axis, getattr(present, name)) for name, axis in axes.items()}


def _holding(name: str, axis: Axis, present: Any) -> Axis:
    points = axis.points()
    if points is not None:
        there = any(_same(point, present) for point in points)
        return axis if there else Axis(choices=[*points, present])
    assert axis.low is not None and axis.high is not None
    if axis.log and present <= 0:
        raise ParamsError(
            f"Search space, `{name}`: the present value {present} has no logarithm. Use `log: false`, or `choices`."
        )
    return axis.model_copy(update={"low": min(axis.low, present), "high": max(axis.high, present)})


def _same(one: Value, other: Value) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return math.isclose(one, other, rel_tol=1e-9)


def drawn(axes: Axes, values: Mapping[str, Value]) -> dict[str, Value]:
    """What a sampler has drawn, with as many digits as a person would write; within the axes."""
    return {name: _readable(axes[name], value) for name, value in values.items()}


def _readable(axis: Axis, value: Value) -> Value:
    if axis.choices is not None or isinstance(value, str):
        return value
    assert axis.low is not None and axis.high is not None
    short = _short(value, DIGITS if axis.step is None else 12)
    return short if axis.low <= short <= axis.high else value


def _short(value: int | float, digits: int) -> int | float:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def grid(axes: Axes) -> list[dict[str, Value]]:
    """Every point of the space; raise ParamsError for an axis whose values cannot be counted."""
    points = {name: axis.points() for name, axis in axes.items()}
    if endless := [name for name, values in points.items() if values is None]:
        raise ParamsError(f"A grid needs `choices` or a `step` for each setting (lacking: {', '.join(endless)}).")
    product = itertools.product(*(values or [] for values in points.values()))
    return [dict(zip(points, values, strict=True)) for values in product]
