"""What W&B wrote offline: its library has no reader in Python, so its files are parsed here.

A file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB with pieces of records, each after 4 bytes of
checksum, 2 of length and 1 of kind (1: whole, 2, 3 and 4: first, middle and last piece).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

HEADER_BYTES, BLOCK_BYTES, PIECE_HEADER_BYTES = 7, 32 * 1024, 7


@dataclass
class OfflineRun:
    """One folder of W&B's, which is a life of a run."""

    id: str = ""
    notes: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)


def offline_runs(folder: Path) -> list[OfflineRun]:
    """All lives in a folder, oldest first."""
    files = sorted(folder.rglob("*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    return [_read(file.read_bytes()) for file in files]


def _read(data: bytes) -> OfflineRun:
    run = OfflineRun()
    for content in _records(data):
        record = Record.FromString(content)
        if record.HasField("run"):
            run.id, run.notes = record.run.run_id, record.run.notes or run.notes
            run.config |= _values(record.run.config.update)
        if record.HasField("config"):
            run.config |= _values(record.config.update)
        if record.HasField("summary"):
            run.summary |= _values(record.summary.update)
        if record.HasField("history"):
            run.rows.append(_values(record.history.item))
    return run


def _values(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    place, begun = HEADER_BYTES, b""
    while place + PIECE_HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - place % BLOCK_BYTES
        if left < PIECE_HEADER_BYTES:  # no piece begins there
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        place += PIECE_HEADER_BYTES
        piece, place = data[place : place + length], place + length
        if kind == 0:  # a file that was cut off
            return
        begun = piece if kind in (1, 2) else begun + piece
        if kind in (1, 4):
            yield begun
