"""The model folder: rows to matrix, what is written, what is refused, and what comes back."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipelines import archive, baseline, model, network
from pipelines.errors import BallastError, DataRejected
from pipelines.files import write_json
from pipelines.model import Transform
from pipelines.schema import Features

FEATURES = Features(numeric=["age", "wind"], categorical=["carrier", "dest"])
SQL = b"SELECT CAST(id AS VARCHAR) AS key, time, late AS label, age, wind, carrier, dest FROM events"
SCHEMA: dict[str, Any] = {
    "features": FEATURES.model_dump(),
    "tables": {
        "events": {
            "key": ["id"],
            "time": "time",
            "columns": {
                "id": "int",
                "time": "timestamp",
                "late": "bool",
                "age": "float",
                "wind": "float",
                "carrier": "string",
                "dest": "string",
            },
        }
    },
}


def flights(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    age = random.normal(10, 3, rows)
    age[::5] = np.nan
    carrier = random.choice(np.array(["AA", "B6", "UA"], dtype=object), rows)
    carrier[::7] = None
    return pd.DataFrame(
        {
            "label": (random.random(rows) < 0.3).astype("int8"),
            "age": age,
            "wind": random.exponential(5, rows),
            "carrier": carrier,
            "dest": random.choice(np.array(["BOS", "LAX"], dtype=object), rows),
        }
    )


def raw() -> pd.DataFrame:
    """Rows as a user may bring them: other order of columns, one too many, things that training never saw."""
    rows = flights(50, seed=1)[["dest", "carrier", "wind", "age"]].assign(gate="B2")
    rows.loc[0, "carrier"] = "ZZ"
    rows.loc[1, "wind"] = np.nan
    rows.loc[2, "dest"] = None
    return rows


@pytest.fixture(scope="module")
def transform() -> Transform:
    return Transform.fit(flights(), FEATURES)


@pytest.fixture(scope="module")
def net(transform: Transform) -> network.Network:
    torch.manual_seed(1)
    categories = tuple(len(column.vocabulary) + 1 for column in transform.categorical)
    bins = (-2.0, -1.0, 0.0, 2.0), (-1.0, 0.5, 3.0)  # of different number
    return network.Network(
        network.NetworkConfig(2, (0,), bins, categories, ensemble=4, blocks=2, width=16, dropout=0.1, embedding=3)
    )


@pytest.fixture(scope="module")
def trees(transform: Transform) -> Any:
    rows = flights()
    window = transform.encode(rows), rows["label"].to_numpy(np.float32)
    params = baseline.HgbParams(iterations=5, patience=5, learning_rate=0.3, max_leaf_nodes=6)
    return baseline.fit_hgb(window, window, {2: 4, 3: 3}, params, seed=1)


@pytest.fixture(scope="module")
def pipeline(transform: Transform) -> Any:
    rows = flights()
    window = transform.encode(rows), rows["label"].to_numpy(np.float32)
    return baseline.fit_logistic(
        window, {2: 4, 3: 3}, baseline.LogisticParams(iterations=50, inverse_penalty=1.0), seed=1
    )


@pytest.fixture(scope="module")
def tabm_folder(tmp_path_factory: pytest.TempPathFactory, net: network.Network, transform: Transform) -> Path:
    folder = tmp_path_factory.mktemp("tabm") / "model"
    model.save(folder, "tabm", network.dumps(net), transform, SCHEMA, SQL)
    return folder


@pytest.fixture(scope="module")
def hgb_folder(tmp_path_factory: pytest.TempPathFactory, trees: Any, transform: Transform) -> Path:
    folder = tmp_path_factory.mktemp("hgb") / "model"
    model.save(folder, "hgb", baseline.dumps(trees), transform, SCHEMA, SQL)
    return folder


@pytest.fixture(scope="module")
def logistic_folder(tmp_path_factory: pytest.TempPathFactory, pipeline: Any, transform: Transform) -> Path:
    folder = tmp_path_factory.mktemp("logistic") / "model"
    model.save(folder, "logistic", baseline.dumps(pipeline), transform, SCHEMA, SQL)
    return folder


@pytest.fixture(params=["tabm", "hgb", "logistic"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a model folder of each kind."""
    return Path(shutil.copytree(request.getfixturevalue(f"{request.param}_folder"), tmp_path / "model"))


# --- rows to matrix ---------------------------------------------------------------------------------------------------


def test_encode_train_rows_standardises_numbers_and_keeps_missing(transform: Transform) -> None:
    matrix = transform.encode(flights())
    assert matrix.dtype == np.float32
    assert np.isnan(matrix[::5, 0]).all()
    np.testing.assert_allclose(np.nanmean(matrix[:, :2], axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.nanstd(matrix[:, :2], axis=0), 1, atol=1e-6)


def test_encode_missing_or_unseen_category_gives_code_zero(transform: Transform) -> None:
    rows = pd.DataFrame({"age": 1.0, "wind": 1.0, "carrier": ["AA", "UA", "ZZ", None, np.nan], "dest": None})
    matrix = transform.encode(rows)
    assert matrix[:, 2].tolist() == [1, 3, 0, 0, 0]
    assert matrix[:, 3].tolist() == [0] * 5


def test_encode_other_column_types_of_equal_values_gives_equal_matrix(transform: Transform) -> None:
    rows = flights(40)
    other = rows.astype({"age": "Float64", "wind": object, "carrier": "category", "dest": "string"})
    np.testing.assert_array_equal(transform.encode(rows), transform.encode(other))


def test_fit_column_of_one_value_is_dropped_with_its_reason() -> None:
    transform = Transform.fit(flights().assign(wind=np.nan, dest="BOS"), FEATURES)
    assert transform.dropped == {"wind": "all null", "dest": "always BOS"}
    assert transform.features == Features(numeric=["age"], categorical=["carrier"])
    assert transform.encode(flights().drop(columns=["wind", "dest"])).shape == (400, 2)


def test_fit_number_of_one_value_and_nulls_is_kept() -> None:
    transform = Transform.fit(flights().assign(wind=[3.0, np.nan] * 200), FEATURES)
    matrix = transform.encode(flights(3).assign(wind=[3.0, np.nan, 4.0]))
    np.testing.assert_array_equal(matrix[:, 1], [0, np.nan, 1])


def test_fit_no_column_with_two_values_is_rejected() -> None:
    with pytest.raises(DataRejected, match="No feature is left"):
        Transform.fit(flights().assign(age=1.0, wind=2.0, carrier="AA", dest=None), FEATURES)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (flights(3).drop(columns="wind"), "no column `wind`"),
        (flights(3).assign(carrier=[1, 2, 3]), "`carrier` must hold strings.*int64.*VARCHAR"),
        (flights(3).assign(wind=["calm", "1", "2"]), "`wind` must hold numbers.*calm"),
    ],
)
def test_encode_wrong_column_names_it(transform: Transform, rows: pd.DataFrame, message: str) -> None:
    with pytest.raises(BallastError, match=message):
        transform.encode(rows)


# --- the round trip ---------------------------------------------------------------------------------------------------


def test_load_tabm_predicts_as_the_network_did(tabm_folder: Path, net: network.Network, transform: Transform) -> None:
    with torch.inference_mode():
        expected = network.Probability(net).eval()(torch.from_numpy(transform.encode(raw()))).numpy()
    predicted = model.load(tabm_folder).predict(raw())
    assert predicted.dtype == np.float64
    np.testing.assert_allclose(predicted, expected, rtol=0, atol=1e-6)


def test_load_hgb_predicts_as_the_trees_did(hgb_folder: Path, trees: Any, transform: Transform) -> None:
    np.testing.assert_array_equal(
        model.load(hgb_folder).predict(raw()), trees.predict_proba(transform.encode(raw()))[:, 1]
    )


def test_load_logistic_predicts_as_the_pipeline_did(logistic_folder: Path, pipeline: Any, transform: Transform) -> None:
    np.testing.assert_array_equal(
        model.load(logistic_folder).predict(raw()), pipeline.predict_proba(transform.encode(raw()))[:, 1]
    )


def test_predict_temperature_divides_the_log_odds(
    hgb_folder: Path, trees: Any, transform: Transform, tmp_path: Path
) -> None:
    schema = {**SCHEMA, "temperature": 2.0}
    model.save(tmp_path / "model", "hgb", baseline.dumps(trees), transform, schema, SQL)
    cold, warm = (model.load(folder).predict(raw()) for folder in (hgb_folder, tmp_path / "model"))
    np.testing.assert_allclose(np.log(warm / (1 - warm)), np.log(cold / (1 - cold)) / 2, rtol=1e-9)


def test_tempered_probabilities_at_the_ends_stay_there() -> None:
    warm = model.tempered(np.array([0.0, 0.5, 1.0]), 1.7)
    np.testing.assert_allclose(warm, [0, 0.5, 1], rtol=0, atol=1e-15)


def test_predict_rows_in_other_company_keeps_their_probability(folder: Path) -> None:
    loaded, rows = model.load(folder), flights(network.CHUNK + 60, seed=2)
    together = loaded.predict(rows)
    shuffled = rows.sample(frac=1, random_state=1)
    np.testing.assert_allclose(loaded.predict(shuffled), together[shuffled.index], rtol=0, atol=1e-6)
    alone = [loaded.predict(rows.iloc[[row]])[0] for row in range(0, len(rows), 200)]
    np.testing.assert_allclose(alone, together[::200], rtol=0, atol=1e-6)


def test_predict_no_rows_gives_no_probabilities(folder: Path) -> None:
    assert model.load(folder).predict(flights(3).iloc[:0]).shape == (0,)


def test_predict_infinite_value_names_the_column(folder: Path) -> None:
    with pytest.raises(BallastError, match="Infinite values in wind"):
        model.load(folder).predict(flights(3).assign(wind=[1.0, np.inf, 2.0]))


def test_predict_network_of_nan_weights_is_refused(transform: Transform, net: network.Network, tmp_path: Path) -> None:
    broken = network.Network(net.config)
    torch.nn.init.constant_(broken.output.bias, float("nan"))
    model.save(tmp_path / "model", "tabm", network.dumps(broken), transform, SCHEMA, SQL)
    with pytest.raises(BallastError, match="no probability for 3 of 3 rows"):
        model.load(tmp_path / "model").predict(flights(3))


def test_prepare_runs_the_sql_of_the_model(folder: Path, tmp_path: Path) -> None:
    events = flights(20).rename(columns={"label": "late"}).astype({"late": "bool"})
    events.insert(0, "id", range(20))
    events.insert(1, "time", pd.date_range("2013-01-01", periods=20, freq="h", tz="UTC", unit="us"))
    (tmp_path / "tables" / "events").mkdir(parents=True)
    events.to_parquet(tmp_path / "tables" / "events" / "all.parquet", index=False)
    loaded = model.load(folder)
    rows = loaded.prepare(tmp_path / "tables", None)
    np.testing.assert_array_equal(loaded.predict(rows), loaded.predict(flights(20)))


@pytest.mark.filterwarnings("ignore:.*inferred as AnyType:UserWarning")  # where mlflow.pyfunc is first imported
@pytest.mark.filterwarnings("ignore:.*input example was not provided:UserWarning")
def test_pyfunc_of_mlflow_predicts_from_strings_and_missing_values(tabm_folder: Path, tmp_path: Path) -> None:
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    columns = [ColSpec(DataType.double, name, required=False) for name in FEATURES.numeric]
    columns += [ColSpec(DataType.string, name, required=False) for name in FEATURES.categorical]
    mlflow.pyfunc.save_model(
        path=tmp_path / "pyfunc",
        loader_module="pipelines.model",
        data_path=str(tabm_folder),
        pip_requirements=[],
        signature=ModelSignature(Schema(columns), Schema([ColSpec(DataType.double)])),
    )
    served = mlflow.pyfunc.load_model(str(tmp_path / "pyfunc"))
    np.testing.assert_array_equal(served.predict(raw()), model.load(tabm_folder).predict(raw()))


def test_import_of_model_is_light() -> None:
    heavy = "{'torch', 'sklearn', 'skops', 'mlflow', 'duckdb', 'pandas'}"
    code = f"import sys, pipelines.model; sys.exit(', '.join({heavy} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"import pipelines.model also imports {done.stderr}"


# --- what is refused --------------------------------------------------------------------------------------------------


def _change_a_byte(folder: Path) -> None:
    file = folder / "transform.json"
    file.write_bytes(file.read_bytes().replace(b"wind", b"mind"))


def _link(folder: Path) -> None:
    shutil.move(folder / "schema.json", folder.parent / "schema.json")
    (folder / "schema.json").symlink_to(folder.parent / "schema.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change_a_byte, "Changed since.*transform.json"),
        (lambda folder: (folder / "prepare.sql").unlink(), "not those of its manifest.json.*prepare.sql"),
        (lambda folder: (folder / "model.pkl").write_bytes(b""), "not those of its manifest.json.*model.pkl"),
        (lambda folder: (folder / "code").mkdir(), "not those of its manifest.json.*code"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (_link, "plain files.*schema.json"),
    ],
)
def test_load_folder_that_differs_from_its_manifest_is_refused(
    hgb_folder: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = Path(shutil.copytree(hgb_folder, tmp_path / "model"))
    change(folder)
    with pytest.raises(BallastError, match=message):
        model.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "helper.pkl").write_bytes(b""), "no model of ours: helper.pkl"),
        (lambda folder: (folder / "prepare.sql").unlink(), "no model of ours: prepare.sql"),
        (lambda folder: (folder / "schema.json").write_text('{"kind": "another"}'), "model.skops, weights missing"),
    ],
)
def test_load_files_that_make_no_model_are_refused_though_the_manifest_has_them(
    hgb_folder: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = Path(shutil.copytree(hgb_folder, tmp_path / "model"))
    change(folder)
    (folder / "manifest.json").unlink()
    hashes = {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    write_json(folder / "manifest.json", {"files": hashes})
    with pytest.raises(BallastError, match=message):
        model.load(folder)


def test_digest_equal_models_in_two_folders_is_equal(
    tabm_folder: Path, net: network.Network, transform: Transform, tmp_path: Path
) -> None:
    model.save(tmp_path / "again", "tabm", network.dumps(net), transform, SCHEMA, SQL)
    model.save(tmp_path / "other", "tabm", network.dumps(net), transform, SCHEMA, SQL + b" WHERE true")
    digest = model.load(tabm_folder).digest
    assert model.load(tmp_path / "again").digest == digest
    assert model.load(tmp_path / "other").digest != digest


class Touch:
    """Its pickle makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def _pickled_weight(members: dict[str, bytes], mark: Path) -> None:
    config = json.loads(members["archive/data/weights/model_weights_config.json"])
    next(iter(config["config"].values()))["use_pickle"] = True
    members["archive/data/weights/model_weights_config.json"] = json.dumps(config).encode()
    members["archive/data/weights/weight_0"] = pickle.dumps(Touch(mark))


def _pickled_constant(members: dict[str, bytes], mark: Path) -> None:
    constant = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    config = json.dumps({"config": {"c": constant}})
    members["archive/data/constants/model_constants_config.json"] = config.encode()
    members["archive/data/constants/opaque_obj_0"] = pickle.dumps(Touch(mark))


def _sample_inputs(members: dict[str, bytes], mark: Path) -> None:
    members["archive/data/sample_inputs/model.pt"] = pickle.dumps(Touch(mark))


def _library(members: dict[str, bytes], mark: Path) -> None:
    members["archive/data/aotinductor/model/lib.so"] = b""


def _replace(old: str, new: str) -> Callable[[dict[str, bytes], Path], None]:
    def change(members: dict[str, bytes], mark: Path) -> None:
        graph = members["archive/models/model.json"]
        assert old.encode() in graph
        members["archive/models/model.json"] = graph.replace(old.encode(), new.replace("MARK", str(mark)).encode())

    return change


@pytest.mark.parametrize(
    "change",
    [
        _pickled_weight,
        _pickled_constant,
        _sample_inputs,
        _library,
        _replace("torch.ops.aten.sigmoid.default", "torch.os.system"),
        _replace("Symbol('s", "open('MARK', 'w') or Symbol('s"),
        _replace('"forward_arg_names": ["x"]', "\"forward_arg_names\": [\"x=open('MARK', 'w')\"]"),
    ],
    ids=["weight", "constant", "inputs", "library", "operator", "expression", "name"],
)
def test_loads_network_with_code_in_it_is_refused_unread(
    tabm_folder: Path, tmp_path: Path, change: Callable[[dict[str, bytes], Path], None]
) -> None:
    members = archive.unpack((tabm_folder / "network.pt2").read_bytes())
    change(members, tmp_path / "mark")
    with pytest.raises(BallastError, match="holds what no network of this project holds"):
        network.loads(archive.pack(members))
    assert not (tmp_path / "mark").exists()


def test_loads_trees_of_an_untrusted_type_is_refused(trees: Any) -> None:
    import skops.io

    with pytest.raises(BallastError, match=r"posix\.system"):
        baseline.loads(skops.io.dumps(partial(os.system, "true")))


def test_loads_trees_of_another_class_is_refused() -> None:
    import skops.io
    from sklearn.linear_model import LogisticRegression

    with pytest.raises(BallastError, match="must hold a HistGradientBoostingClassifier"):
        baseline.loads(skops.io.dumps(LogisticRegression()))


def test_loads_pipeline_of_other_steps_is_refused() -> None:
    import skops.io
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import FunctionTransformer

    hostile = Pipeline([("inputs", FunctionTransformer()), ("regression", LogisticRegression())])
    with pytest.raises(BallastError, match="pipeline of other steps"):
        baseline.loads(skops.io.dumps(hostile))


def test_loads_pipeline_with_another_step_inside_its_imputer_is_refused(pipeline: Any) -> None:
    import copy

    from sklearn.preprocessing import FunctionTransformer

    hostile = copy.deepcopy(pipeline)
    hostile[0].transformers_[0][1].indicator_ = FunctionTransformer(np.exp)
    with pytest.raises(BallastError, match="pipeline of other steps"):
        baseline.loads(baseline.dumps(hostile))


def test_loads_trees_for_other_columns_is_refused(trees: Any) -> None:
    import copy

    hostile = copy.deepcopy(trees)
    hostile._bin_mapper.is_categorical_ = np.empty(0, dtype=np.uint8)
    with pytest.raises(BallastError, match="other columns"):
        baseline.loads(baseline.dumps(hostile))


@pytest.mark.parametrize(("field", "value"), [("left", 10**6), ("left", 0), ("feature_idx", 99), ("feature_idx", -1)])
def test_loads_trees_with_an_index_out_of_range_is_refused(trees: Any, field: str, value: int) -> None:
    nodes = trees._predictors[0][0].nodes
    before = nodes[field][0]
    nodes[field][0] = value
    broken = baseline.dumps(trees)
    nodes[field][0] = before
    with pytest.raises(BallastError, match="index out of range"):
        baseline.loads(broken)


def test_untrusted_types_are_those_listed(trees: Any, pipeline: Any) -> None:
    import skops.io

    files = [baseline.dumps(classifier) for classifier in (trees, pipeline)]
    assert {name for data in files for name in skops.io.get_untrusted_types(data=data)} == set(baseline.TRUSTED)


@pytest.mark.parametrize("data", [b"no zip", b"PK\x05\x06" + b"\0" * 4])
def test_unpack_no_archive_is_refused(data: bytes) -> None:
    with pytest.raises(BallastError, match="no zip archive"):
        archive.unpack(data)


def test_load_manifest_written_anew_over_a_hostile_network_is_still_refused(tabm_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tabm_folder, tmp_path / "model"))
    members = archive.unpack((folder / "network.pt2").read_bytes())
    _pickled_weight(members, tmp_path / "mark")
    (folder / "network.pt2").write_bytes(archive.pack(members))
    (folder / "manifest.json").unlink()
    write_json(
        folder / "manifest.json",
        {"files": {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}},
    )
    with pytest.raises(BallastError, match="a pickle"):
        model.load(folder)
    assert not (tmp_path / "mark").exists()
