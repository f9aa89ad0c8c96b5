"""torch.compile on the CPU: the nearest to what a GPU runs by default where there is none to try it on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

COMPARE = """
import json
import numpy as np
from pipelines.fit import TrainParams, Window, fit, reproducible
from pipelines.model import Numeric, Transform

random = np.random.default_rng(1)
matrix = random.normal(size=(1000, 3)).astype(np.float32)
matrix[::9, 1] = np.nan
label = (random.random(1000) < 1 / (1 + np.exp(-2 * matrix[:, 0]))).astype(np.float32)
transform = Transform(tuple(Numeric(name, 0.0, 1.0) for name in "abc"), (), {})
tabm = {"ensemble": 4, "blocks": 2, "width": 16, "dropout": 0.0, "embedding": 4, "bins": 8, "epochs": 6, "patience": 6}
tabm |= {"batch_size": 64, "learning_rate": 0.02, "weight_decay": 0.0, "averaging": 0.0}
shared = {"seed": 1, "threads": 1, "device": "cpu", "candidates": ["tabm"], "temperature": False, "refit": False}
others = {
    "hgb": {"iterations": 1, "patience": 1, "learning_rate": 0.1, "max_leaf_nodes": 2},
    "logistic": {"iterations": 1, "inverse_penalty": 1.0},
}
found = []
for compiled in (False, True):
    params = TrainParams.model_validate({**shared, **others, "tabm": tabm, "compile": compiled})
    with reproducible(1, 1):
        candidate = fit("tabm", Window(matrix[:800], label[:800]), Window(matrix[800:], label[800:]), transform, params)
    found.append(candidate.predict(matrix).tolist())
from torch._dynamo.utils import counters
print(json.dumps([*found, counters["stats"]["unique_graphs"]]))
"""


@pytest.mark.e2e
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler (g++)")
def test_compiled_training_learns_what_the_plain_one_does() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", COMPARE], cwd=root, capture_output=True, text=True, check=True)
    *found, graphs = json.loads(done.stdout.splitlines()[-1])
    plain, compiled = map(np.array, found)
    assert graphs == 1
    assert np.ptp(plain) > 0.2
    np.testing.assert_allclose(compiled, plain, rtol=0, atol=1e-4)
