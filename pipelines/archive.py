"""Zip archives whose bytes depend on their members only: no dates, no order of writing, no compression."""

from __future__ import annotations

import io
from collections.abc import Mapping
from zipfile import BadZipFile, ZipFile, ZipInfo

from pipelines.errors import BallastError


def pack(members: Mapping[str, bytes]) -> bytes:
    """The archive of ``members`` by name; equal members give equal bytes."""
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive:
        for name in sorted(members):
            archive.writestr(ZipInfo(name), members[name])  # a ZipInfo of its own is dated 1980-01-01
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, bytes]:
    """The members of an archive by name; raise BallastError if it is none, or holds a name twice."""
    try:
        with ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise BallastError("An archive in the model holds a name twice. Take the model from its source again.")
            return {name: archive.read(name) for name in names}
    except BadZipFile as error:
        raise BallastError(
            f"A file of the model is no zip archive ({error}). Take the model from its source again."
        ) from None
