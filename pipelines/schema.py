"""The tables of a project: their columns, types, keys and time columns, as params.yaml declares them."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

from pipelines.params import Params

ColumnType = Literal["int", "float", "string", "bool", "timestamp"]

ARROW: dict[ColumnType, pa.DataType] = {
    "int": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}


class Table(Params):
    """One source table. Without a ``time`` column it is a single partition named ``all``."""

    columns: dict[str, ColumnType]
    key: list[str]
    time: str | None = None

    @property
    def arrow(self) -> pa.Schema:
        """The Arrow schema that every partition of this table has; every column may be null."""
        return pa.schema([(name, ARROW[kind]) for name, kind in self.columns.items()])


class Declared(Params, extra="ignore"):
    """The tables of the section ``land`` of params.yaml, for the stages that do not land."""

    tables: dict[str, Table]


class Features(Params):
    """The columns a model reads, by kind, in the order of its input matrix."""

    numeric: list[str]
    categorical: list[str]

    @property
    def names(self) -> list[str]:
        """All feature names, numeric first."""
        return [*self.numeric, *self.categorical]
