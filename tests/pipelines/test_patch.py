"""A diff for params.yaml changes values, and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines import patch
from pipelines.errors import BallastError

SHIPPED = (Path(__file__).resolve().parents[2] / "params.yaml").read_text()


def applied(folder: Path, text: str, changes: str) -> str:
    """The file after `git apply`, which is no place to be lenient."""
    (folder / "params.yaml").write_bytes(text.encode())
    (folder / "a.diff").write_bytes(changes.encode())
    subprocess.run(["git", "apply", "a.diff"], cwd=folder, check=True, capture_output=True)
    return (folder / "params.yaml").read_bytes().decode()


def test_diff_applies_to_the_shipped_params_and_changes_the_values_alone(tmp_path: Path) -> None:
    values = {"learning_rate": 0.00001, "width": 128, "averaging": 0.995, "ensemble": 16}
    changes = patch.diff(SHIPPED, "params.yaml", ("train", "tabm"), values)
    new = applied(tmp_path, SHIPPED, changes)
    expected = yaml.safe_load(SHIPPED)
    expected["train"]["tabm"] |= values
    assert yaml.safe_load(new) == expected
    assert new.count("\n") == SHIPPED.count("\n")
    before, after = SHIPPED.splitlines(), new.splitlines()
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 4
    [comment] = [line for line in after if line.startswith("    averaging: ")]
    assert comment.endswith("  # of the weights, as a moving average with this decay a step; 0 is none")
    assert comment.index("#") == next(line.index("#") for line in before if line.startswith("    averaging: "))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: {b: {x: 1, y: 2}}", "a: {b: {x: 30, y: 2}}"),
        ("a:\n  b:\n    x: 1  # one\n", "a:\n  b:\n    x: 30  # one\n"),
        ("a:\n  b:\n    x: 1     # one\n", "a:\n  b:\n    x: 30    # one\n"),
        ("a:\r\n  b:\r\n    x: 1 # x: 1\r\n  c: {x: 1}\r\n", "a:\r\n  b:\r\n    x: 30 # x: 1\r\n  c: {x: 1}\r\n"),
        ("# ü\na:\n  b: {\n    'x': '1'}", "# ü\na:\n  b: {\n    'x': 30}"),
    ],
)
def test_amended_keeps_the_layout(tmp_path: Path, text: str, expected: str) -> None:
    assert patch.amended(text, ("a", "b"), {"x": 30}) == expected
    assert applied(tmp_path, text, patch.diff(text, "params.yaml", ("a", "b"), {"x": 30})) == expected


def test_amended_refuses_what_would_change_more() -> None:
    text = "a: &same {x: 1}\nb: *same\n"
    with pytest.raises(BallastError, match=r"`b` cannot be changed in place .*Set it by hand: \{x: 2\}"):
        patch.amended(text, ("b",), {"x": 2})


@example("0,")
@given(st.one_of(st.floats(allow_nan=False), st.integers(), st.booleans(), st.text(max_size=8)))
def test_amended_value_is_read_as_what_it_is(value: Any) -> None:
    if value == "":
        return
    found = yaml.safe_load(patch.amended("a: {x: 1, y: 2}  # z", ("a",), {"x": value}))["a"]
    assert (found["x"], type(found["x"]), found["y"]) == (value, type(value), 2)
