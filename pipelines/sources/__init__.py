"""Where rows come from: one adapter a file.

``land.source`` names a module of this folder, and the module has two classes:

    class Options(Params)      what stands under ``land.options``, checked when the adapter is opened
    class Adapter              a ``Source``: which pieces there are, and the rows of one piece

A piece is a part that can be read alone: a file, a day of a database table, a page of an API. Its revision is any
text that changes whenever the piece's rows may have changed: a version, a modification time, an ETag. Landing lists the
pieces every time, so listing reads no rows; it reads a piece only when its revision is new, or when the as-of date has
passed rows that an earlier landing left out.

Types, partitions and the as-of date are landing's business: an adapter gives a piece whole, its rows in a steady order,
its columns as text or typed. A piece that is listed no more takes its rows along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Protocol, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from pydantic import ValidationError

from pipelines.errors import DataRejected, ParamsError
from pipelines.sources import _secrets


class Source(Protocol):
    """What landing asks of an adapter.

    Either method raises TryAgain when the place cannot be reached, and DataRejected when what is there cannot be used.
    """

    def pieces(self, table: str, until: date) -> Mapping[str, str]:
        """The pieces of a table, each with its revision; those without a row before ``until`` may be left out."""
        ...

    def read(self, table: str, piece: str) -> pa.Table:
        """All rows of one piece."""
        ...


def connect(name: str, options: Mapping[str, Any]) -> Source:
    """Open the adapter ``name``; raise ParamsError if there is none, or if it does not take these options."""
    known = sorted(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))
    if name not in known:
        near = get_close_matches(name, known, n=1)
        remedy = f"did you mean `{near[0]}`?" if near else "write one in pipelines/sources/."
        raise ParamsError(f"`land.source`: there is no adapter {name!r} (known: {', '.join(known)}); {remedy}")
    module = import_module(f"{__name__}.{name}")
    try:
        return cast(Source, module.Adapter(module.Options.model_validate(options)))
    except ValidationError as error:
        lines = [_explain(name, detail["loc"], detail["msg"], detail["input"]) for detail in error.errors()]
        raise ParamsError("; ".join(lines)) from None


def _explain(name: str, loc: tuple[int | str, ...], message: str, value: Any) -> str:
    where, found = ".".join(["land.options", *map(str, loc)]), _secrets.mask(repr(value))
    return f"`{where}`: {message} (found {found}); pipelines/sources/{name}.py says what the adapter takes"


def read_csv(data: bytes, name: str, nulls: Sequence[str]) -> pa.Table:
    """Read CSV with a header into string columns, the fields in ``nulls`` as null; DataRejected if it is not CSV.

    Strings, because guessed types lose what was written: the code 007 would become the number 7.
    """
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    try:
        header = pa.csv.open_csv(pa.BufferReader(data), parse_options=parse).schema.names
        convert = pa.csv.ConvertOptions(
            column_types={column: pa.string() for column in header}, null_values=nulls, strings_can_be_null=True
        )
        return pa.csv.read_csv(pa.BufferReader(data), parse_options=parse, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise DataRejected(f"{name} is not readable as CSV: {error}. Put the whole file there again.") from None


def read_parquet(data: bytes, name: str) -> pa.Table:
    """Read Parquet as it is typed there; DataRejected if it is not Parquet."""
    try:
        return pa.parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataRejected(f"{name} is not readable as Parquet: {error}. Put the whole file there again.") from None
