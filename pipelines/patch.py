"""A diff for a YAML file: other values in place, all else as it was, comments and layout too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import unified_diff
from functools import reduce
from typing import Any

import yaml

from pipelines.errors import BallastError


def diff(text: str, name: str, where: Sequence[str], values: Mapping[str, Any]) -> str:
    """The unified diff that sets ``values`` in the mapping at ``where`` of the YAML ``text`` of the file ``name``."""
    before, after = (version.splitlines(keepends=True) for version in (text, amended(text, where, values)))
    lines = unified_diff(before, after, f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def amended(text: str, where: Sequence[str], values: Mapping[str, Any]) -> str:
    """The YAML ``text`` with the scalars ``values`` in the mapping at ``where`` replaced."""
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    nodes = reduce(_below, where, root).value
    spans = {key.value: (value.start_mark.index, value.end_mark.index) for key, value in nodes}
    new = text
    for name in sorted(values, key=lambda name: spans[name], reverse=True):  # from the end: places before it stay
        new = _replaced(new, *spans[name], _scalar(values[name]))
    if yaml.safe_load(new) != _expected(yaml.safe_load(text), where, values):
        raise BallastError(
            f"`{'.'.join(where)}` cannot be changed in place (an alias, or a merged key?). "
            f"Set it by hand: {_scalar(dict(values))}"
        )
    return new


def _below(node: Any, name: str) -> Any:
    return {key.value: value for key, value in node.value}[name]


def _scalar(value: Any) -> str:
    """A value as YAML, so that it is read as what it is: 1.0e-05, which 1e-05 is not."""
    lines = yaml.safe_dump([value], default_flow_style=True, width=1000).splitlines()  # in a list: its commas count too
    return lines[0][1:-1] if len(lines) == 1 else json.dumps(value)  # of several lines: JSON, which is YAML too


def _replaced(text: str, start: int, end: int, new: str) -> str:
    """A comment behind the value stays in its column, where there is room."""
    after = text[end:]
    if comment := re.match(r"( +)#", after):
        spaces = len(comment[1])
        kept = max(min(2, spaces), spaces - (len(new) - (end - start)))
        after = " " * kept + after[spaces:]
    return text[:start] + new + after


def _expected(content: Any, where: Sequence[str], values: Mapping[str, Any]) -> Any:
    changed = _expected(content[where[0]], where[1:], values) if where else None
    return {**content, **({where[0]: changed} if where else values)}
