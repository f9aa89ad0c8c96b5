"""Read params.yaml: one frozen Pydantic class per section, each in its stage's module."""

from __future__ import annotations

from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

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
    where = ".".join([section, *map(str, detail["loc"])])
    if detail["type"] != "extra_forbidden":
        return f"`{where}`: {detail['msg']} (found {detail['input']!r})"
    known = _fields_beside(cls, detail["loc"][:-1])
    near = get_close_matches(str(detail["loc"][-1]), known, n=1)
    remedy = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(sorted(known))}"
    return f"`{where}` is not a setting; {remedy}"


def _fields_beside(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The names of the fields of the model at ``loc`` inside ``cls``."""
    model: Any = cls
    for step in loc:
        fields = getattr(model, "model_fields", {})
        if step in fields:
            model = _model_in(fields[step].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The Pydantic class inside an annotation such as ``X | None`` or ``dict[str, X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        if found := _model_in(part):
            return found
    return None
