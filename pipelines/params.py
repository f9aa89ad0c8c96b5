"""Read params.yaml: one frozen Pydantic class per section, each in its stage's module."""

from __future__ import annotations

import re
import textwrap
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from pipelines.errors import ParamsError


class Params(BaseModel):
    """Base of every section: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Section = TypeVar("Section", bound=Params)


def load(path: Path, section: str, cls: type[Section]) -> Section:
    """Read one section of ``path``; raise ParamsError naming each wrong key, its value and the remedy."""
    values = _read(path).get(section)
    if values is None:
        raise ParamsError(f"{path} has no section `{section}`. Add it; the shipped params.yaml shows its shape.")
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [_explain(section, cls, detail) for detail in error.errors()]
        raise ParamsError(f"{path}: " + "; ".join(lines)) from None


def as_of(path: Path) -> date:
    """The as-of date of the run: nothing on or after its midnight (UTC) may be seen."""
    value = _read(path).get("as_of")
    try:
        return date.fromisoformat(value or "")
    except (TypeError, ValueError):
        raise ParamsError(f'{path}: `as_of` must be a quoted date such as "2013-04-01" (found {value!r}).') from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"There is no {path}. Run from the root of the project, or pass --params.") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path} must hold sections by name (found {type(values).__name__}).")
    return values


def _explain(section: str, cls: type[Params], detail: ErrorDetails) -> str:
    where, kind = ".".join([section, *map(str, detail["loc"])]), detail["type"]
    if kind == "extra_forbidden":
        known = _fields_beside(cls, detail["loc"][:-1])
        return f"`{where}` is not a setting; {_nearest(str(detail['loc'][-1]), known)}"
    if kind == "union_tag_invalid":  # one of several classes, told apart by the value of one key
        known = re.findall(r"'([^']*)'", detail["ctx"]["expected_tags"])
        return f"`{where}` is no `{detail['ctx']['tag']}`; {_nearest(detail['ctx']['tag'], known)}"
    found = textwrap.shorten(repr(detail["input"]), 200, placeholder=" …")
    near = get_close_matches(str(detail["input"]), re.findall(r"'([^']*)'", detail["msg"]), n=1)
    hint = f"; did you mean `{near[0]}`?" if kind == "literal_error" and near else ""
    return f"`{where}`: {detail['msg']} (found {found}){hint}"


def _nearest(wrong: str, known: list[str]) -> str:
    near = get_close_matches(wrong, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(sorted(known))}"


def _fields_beside(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The names of the fields of the model at ``loc`` inside ``cls``."""
    models: list[type[BaseModel]] = [cls]
    for step in loc:
        fields = models[0].model_fields
        if step in fields:
            models = _models_in(fields[step].annotation) or models
        elif tagged := [model for model in models if len(models) > 1 and step in _tags(model)]:
            models = tagged
    return list(models[0].model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The Pydantic classes inside an annotation such as ``X | None`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _tags(model: type[BaseModel]) -> set[Any]:
    """What tells a class from the others of a union: the values of its fields that can have one value only."""
    allowed = [get_args(field.annotation) for field in model.model_fields.values()]
    return {values[0] for values in allowed if len(values) == 1}
