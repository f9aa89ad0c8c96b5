"""The network: TabM, an ensemble of MLPs that share most of their weights; how it becomes a file, and back.

Source of the method: Gorishniy et al., "TabM: Advancing Tabular Deep Learning with Parameter-Efficient
Ensembling" (2025), https://arxiv.org/abs/2410.24210; the layers are those of its authors' package ``tabm``.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipelines import archive
from pipelines.errors import BallastError

CHUNK = 4096  # rows at a time in prediction: bounds memory, and changes no row's probability


@dataclass(frozen=True)
class NetworkConfig:
    """The shape of a network."""

    numeric: int
    """Numeric columns; they come first in the input matrix."""
    missing: tuple[int, ...]
    """Those numeric columns that get a second input, which says that the value is missing."""
    bins: tuple[tuple[float, ...], ...]
    """The edges, rising, between which each numeric column's embedding is linear."""
    categories: tuple[int, ...]
    """Codes of each categorical column, among them code 0: missing or never seen."""
    ensemble: int
    blocks: int
    width: int
    dropout: float
    embedding: int
    """The width of each column's embedding, numeric or categorical."""


class Network(nn.Module):
    """TabM for one float32 matrix: standardised numerics, NaN where missing, then category codes."""

    missing: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        # They bring scikit-learn along: a second that loading a model need not wait.
        import tabm
        from rtdl_num_embeddings import PiecewiseLinearEmbeddings

        super().__init__()
        self.config = config
        self.register_buffer("missing", torch.tensor(config.missing, dtype=torch.long))
        self.numeric = (
            PiecewiseLinearEmbeddings(
                [torch.tensor(edges) for edges in config.bins], config.embedding, activation=False, version="B"
            )
            if config.numeric
            else None
        )
        self.embeddings = nn.ModuleList(_embedding(codes, config.embedding) for codes in config.categories)
        columns = config.numeric + len(config.categories)
        chunks = [1] * len(config.missing) + [config.embedding] * columns
        self.ensemble_view = tabm.EnsembleView(k=config.ensemble)
        self.backbone = tabm.make_tabm_backbone(
            d_in=sum(chunks),
            n_blocks=config.blocks,
            d_block=config.width,
            dropout=config.dropout,
            k=config.ensemble,
            start_scaling_init="random-signs",
            start_scaling_init_chunks=chunks,
        )
        self.output = tabm.LinearEnsemble(config.width, 1, k=config.ensemble)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the ensemble's members, (rows, ensemble), for a matrix (rows, numeric + categorical)."""
        numeric, codes = x[:, : self.config.numeric], x[:, self.config.numeric :].long()
        # not nan_to_num, which would hide an infinite value as a huge one
        known = torch.where(numeric.isnan(), 0.0, numeric)
        missing = numeric[:, self.missing].isnan().to(x.dtype)
        embedded = [self.numeric(known).flatten(1)] if self.numeric is not None else []
        embedded += [embedding(codes[:, i]) for i, embedding in enumerate(self.embeddings)]
        inputs = torch.cat([missing, *embedded], dim=1)
        logits: Tensor = self.output(self.backbone(self.ensemble_view(inputs)))
        return logits.squeeze(-1)


def _embedding(codes: int, size: int) -> nn.Embedding:
    embedding = nn.Embedding(codes, size)
    nn.init.uniform_(embedding.weight, -(size**-0.5), size**-0.5)
    # Code 0 may never occur in training and then keeps what it starts with: zero, the middle of the others.
    nn.init.zeros_(embedding.weight[0])
    return embedding


class Probability(nn.Module):
    """A network with its members' probabilities averaged: one probability of label 1 per row."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities, (rows,)."""
        return torch.sigmoid(self.network(x)).mean(dim=1)


# --- as a file --------------------------------------------------------------------------------------------------------

# What else an exported node remembers: paths and lines of the source, and the names of the modules.
_ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn", "original_aten")


def dumps(network: Network) -> bytes:
    """The network as a torch.export archive (pt2), matrix in, probability out; equal networks give equal bytes."""
    columns = network.config.numeric + len(network.config.categories)
    exported = torch.export.export(
        Probability(network).eval(),
        (torch.zeros(2, columns),),
        dynamic_shapes=({0: torch.export.Dim("rows", min=1)},),
    )
    for node in exported.graph.nodes:
        for origin in _ORIGINS:
            node.meta.pop(origin, None)
    exported._example_inputs = None  # they would be written by pickle
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return archive.pack(archive.unpack(buffer.getvalue()))


def loads(data: bytes) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]:
    """The function from matrix to probability that ``dumps`` wrote; raise BallastError for any other content."""
    members = archive.unpack(data)
    _check(members)
    # Packed anew: torch's reader of zip files sees what was checked, not what another reader may make of the bytes.
    exported = torch.export.load(io.BytesIO(archive.pack(members)))
    module = exported.module()

    @torch.inference_mode()
    def probability(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        chunks = torch.split(torch.from_numpy(matrix), CHUNK)
        return torch.cat([module(chunk) for chunk in chunks]).numpy().astype(np.float64)

    return probability


# torch.export.load is no safe parser: it unpickles what the file says is pickled, loads compiled libraries, resolves
# any dotted name under torch as an operator, evaluates expressions and generates code from names. So a file is first
# held against the little that `dumps` writes.
_MEMBER = re.compile(
    r"archive/(archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json))"
)
_NAME = re.compile(r"[\w.+]*", re.ASCII)
_ROWS = r"Symbol\('s\d+', positive=True, integer=True\)"
_EXPRESSION = re.compile(rf"{_ROWS}|Mul\(Integer\(\d+\), {_ROWS}\)", re.ASCII)  # of sizes and strides
_TREES = (  # the shape of the call: one matrix in, one vector out
    '[1, {"type": "builtins.tuple", "context": "null", "children_spec": [{"type": "builtins.tuple", "context": "null", '
    '"children_spec": [{"type": null, "context": null, "children_spec": []}]}, '
    '{"type": "builtins.dict", "context": "[]", "children_spec": []}]}]',
    '[1, {"type": null, "context": null, "children_spec": []}]',
)
_OPERATORS = frozenset(
    f"torch.ops.aten.{name}"
    for name in (
        *("_assert_tensor_metadata.default", "add.Tensor", "addcmul.default", "cat.default", "clamp.default"),
        *("clamp_max.default", "clamp_min.default", "dropout.default", "embedding.default", "expand.default"),
        *("flatten.using_ints", "index.Tensor", "isnan.default", "matmul.default", "mean.dim", "mul.Tensor"),
        *("numpy_T.default", "relu.default", "select.int", "sigmoid.default", "slice.Tensor", "squeeze.dim"),
        *("to.dtype", "transpose.int", "unsqueeze.default", "where.ScalarSelf"),
    )
)


def _check(members: dict[str, bytes]) -> None:
    odd = [name for name in members if not _MEMBER.fullmatch(name)]
    if members.get("archive/data/sample_inputs/model.pt"):
        odd.append("archive/data/sample_inputs/model.pt")
    for name, content in members.items():
        if name.endswith(".json"):
            odd += [f"{name}: {found}" for found in _odd(json.loads(content))]
    if odd:
        raise BallastError(
            f"network.pt2 holds what no network of this project holds (found {odd[0][:200]!r}, {len(odd)} in all). "
            "It is not loaded. Take the model from its source again."
        )


def _odd(value: Any, key: str = "") -> Iterator[str]:
    """What must not be anywhere in the JSON of an exported network."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _odd(name)
            yield from _odd(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _odd(inner, key)
    elif key == "target":
        if value not in _OPERATORS:
            yield f"operator {value}"
    elif key == "use_pickle":
        if value is not False:
            yield "a pickle"
    elif isinstance(value, str) and not _plain(value, key):
        yield value


def _plain(text: str, key: str) -> bool:
    form = _EXPRESSION if key == "expr_str" else _NAME
    return bool(form.fullmatch(text)) or text in _TREES
