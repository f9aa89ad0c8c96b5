"""dvc.yaml against the code: an edit of anything that a stage imports must run it again."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import run

PROJECT = Path(__file__).resolve().parents[1]
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]


def imported(module: Path) -> set[Path]:
    """The files of `pipelines` that a file imports, anywhere in it, also inside functions; itself included."""
    found, waiting = set(), [module]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            waiting.extend(path for name in names(node) if (path := source(name)))
    return found


def names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def source(name: str) -> Path | None:
    if not name.startswith("pipelines."):
        return None
    path = PROJECT / name.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_all_it_imports(stage: str) -> None:
    deps = {PROJECT / dep for dep in STAGES[stage]["deps"]}
    missing = [
        file.relative_to(PROJECT).as_posix()
        for file in imported(PROJECT / "pipelines" / f"{stage}.py")
        if file not in deps and not any(dep in file.parents for dep in deps)
    ]
    assert not missing, f"dvc.yaml: add to the deps of `{stage}`: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_nothing_it_does_not_use(stage: str) -> None:
    used = imported(PROJECT / "pipelines" / f"{stage}.py")
    deps = [PROJECT / dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")]
    idle = [dep.relative_to(PROJECT).as_posix() for dep in deps if dep not in used]
    assert not idle, f"dvc.yaml: `{stage}` would run again for nothing after an edit of {', '.join(idle)}"


@pytest.mark.parametrize("stage", STAGES)
def test_stage_has_one_name_everywhere(stage: str) -> None:
    spec = STAGES[stage]
    assert spec["cmd"].startswith(f"python -m pipelines.{stage} ")
    assert spec["cmd"].endswith(f" --out data/{stage}")
    outs = [
        next(iter(out)) if isinstance(out, dict) else out
        for key in ("outs", "metrics", "plots")
        for out in spec.get(key, [])
    ]
    assert all(out.startswith(f"data/{stage}/") for out in outs)
    assert f"data/{stage}/result.json" in outs
    assert (PROJECT / "tests" / "pipelines" / f"test_{stage}.py").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_stage_command_names_only_paths_it_depends_on_or_makes(stage: str) -> None:
    spec = STAGES[stage]
    paths = set(re.findall(r"--(?!params)\S+ (\S+)", spec["cmd"]))
    known = [*spec["deps"], f"data/{stage}"]
    unknown = [path for path in paths if not any(dep == path or dep.startswith(f"{path}/") for dep in known)]
    assert not unknown, f"dvc.yaml: the command of `{stage}` reads {unknown}, which is not among its deps"


def test_runner_knows_the_stages_of_the_pipeline() -> None:
    assert tuple(STAGES) == run.STAGES


def test_params_sections_are_read_by_their_stage() -> None:
    params = yaml.safe_load((PROJECT / "params.yaml").read_text())
    for stage, spec in STAGES.items():
        for name in spec.get("params", []):
            section = name.partition(".")[0]
            assert section in params, f"dvc.yaml: `{stage}` names the section {section}, which params.yaml lacks"
