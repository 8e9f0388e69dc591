"""Files of an export: made in a scratch folder, then uploaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import ExportError
from pipeline.host.local_files import sha256_of
from pipeline.host.scratch import scratch_folder
from pipeline.store.storage import Storage


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    url: str
    bytes: int
    sha256: str
    note: str = ""
    """What is not in it, where that may surprise."""


def written_files(
    storage: Storage, folder: str, file_name: str, make: Callable[[Path], None], *, force: bool
) -> list[Exported]:
    """Upload what `make` leaves in an empty local folder; if making fails, nothing is left under `folder`.

    Args:
        storage: Reaches `folder`.
        folder: Where the files are to lie.
        file_name: Of the only one; empty where there are several, which have the folder to themselves.
        make: Given the local folder.
        force: Replace what is there.

    Raises:
        ExportError: The target exists.
    """
    storage.check(folder, write=True)
    target = storage.join(folder, file_name) if file_name else folder
    if not force and (storage.exists(target) if file_name else storage.list_names(target)):
        raise ExportError("--out", "must not exist yet", target, "choose another place, or replace it with --force")
    with scratch_folder() as scratch:
        make(Path(scratch))
        exported = []
        for path in sorted(Path(scratch).iterdir()):
            url = storage.join(folder, path.name)
            storage.upload(path, url)
            exported.append(Exported(url, path.stat().st_size, sha256_of(path)))
    return exported
