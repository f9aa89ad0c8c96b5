"""What a stage in a container is given, against what its code asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import container, run

PROJECT = Path(__file__).resolve().parents[2]
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]


def test_needs_name_every_stage() -> None:
    assert tuple(container.NEEDS) == run.STAGES == tuple(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_needs_cover_what_the_stage_s_code_reaches(stage: str) -> None:
    """A module that reaches out stands among the stage's deps: tests/test_dvc_yaml.py sees to that."""
    needs, deps = container.NEEDS[stage], STAGES[stage]["deps"]
    places = (PROJECT / "pipelines" / f"{stage}.py").read_text()
    reaches = {"source": "pipelines/sources" in deps, "mlflow": "pipelines/tracking.py" in deps}
    assert [name for name, reached in reaches.items() if reached] == ([needs.network] if needs.network else [])
    assert ("MLFLOW_*" in needs.names, "links" in needs.writes) == (reaches["mlflow"], reaches["mlflow"])
    assert ("BALLAST_SOURCE" in needs.reads) == reaches["source"]
    assert ("checkpoints" in needs.writes) == ("pipelines/checkpoint.py" in deps)
    assert ("BALLAST_LANDING" in needs.reads + needs.writes) == ("places.landing()" in places)
    assert needs.gpu == ("device" in (PROJECT / "pipelines" / "fit.py").read_text() and "pipelines/fit.py" in deps)


def test_request_holds_names_of_secrets_and_no_value() -> None:
    env = {
        "BALLAST_VAR": "/v",
        "BALLAST_SOURCE": "/s",
        "BALLAST_LANDING": "/v/landing",
        "BALLAST_LINKS": "/v/runs/d/r/.dvc/tmp/links/train.json",
        "BALLAST_STATE_URI": "postgresql://u:secret@h/d",
        "MLFLOW_TRACKING_URI": "http://u:secret@mlflow",
        "BALLAST_SOURCE_URL": "postgresql://u:secret@h/d",
    }
    for stage in STAGES:
        asked = container.request(stage, "python -m it", Path("/v/runs/d/r"), env)
        assert "secret" not in json.dumps(asked)
        assert asked["writes"][0] == f"/v/runs/d/r/data/{stage}"
        assert asked["reads"][0] == "/v/runs/d/r"
    assert container.request("train", "", Path("/v/runs/d/r"), env)["writes"][1:] == [
        "/v/checkpoints",
        "/v/runs/d/r/.dvc/tmp/links",
    ]
