"""Tars for tests, as other programs write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

from pipeline.shard.tar_scan import RangedFile

Members = Iterable[tuple[str, bytes]]


def tar_bytes(members: Members, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of these members in this order."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return output.getvalue()


def ranged(data: bytes, chunk_bytes: int = 4096) -> RangedFile:
    """Bytes in memory as a file over ranged reads."""
    return RangedFile(lambda offset, length: data[offset : offset + length], len(data), chunk_bytes)
