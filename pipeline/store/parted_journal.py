"""A journal of an object that is written part by part, kept beside it, so that a later process can resume after a kill.

The store knows which parts it holds, not what is in them. So the parts' checksums lie in a small object
`.<name>.parts.json` beside the target, with a digest of what the object shall hold: for other content, writing starts
over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict

from pipeline.store import parted_write
from pipeline.store.json_text import parsed_object
from pipeline.store.parted_write import PartedWrite, WrittenPart
from pipeline.store.storage import Storage

SAVE_SECONDS = 2.0
"""Between two writings of a journal: the most work that a kill costs, beside the parts that were under way."""
_FORMAT = 1


class PartedJournal:
    """The journal of one object that is being written.

    Owns: the list of its parts, never their bytes.
    Concurrency: used by one thread, of a process that holds the lease on the target.
    Failure: a journal that is missing, cannot be read or is of another content costs the parts that were written.
    Blocking: all methods but `add` when nothing is due.
    """

    def __init__(
        self,
        storage: Storage,
        url: str,
        content: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Resume what an earlier process began with the same content, or begin.

        What cannot be resumed is deleted.

        Args:
            storage: Reaches the target.
            url: Of the target, on a store that `takes_parts`.
            content: Digest of all that decides what each part holds.
            clock: Monotonic seconds.
        """
        self._storage, self._url, self._content = storage, url, content
        self._clock = clock
        self._place = f"{url.rpartition('/')[0]}/.{url.rpartition('/')[2]}.parts.json"
        self.is_saved = False
        self.is_visible = False
        """Whether the object is whole and visible, and only its journal is left."""
        found = self._found()
        self.target, parts = found or (parted_write.begin(storage, url), [])
        self.parts: dict[int, WrittenPart] = {part.number: part for part in parts}
        if found:
            parted_write.abandon_all(storage, url, but=self.target)
        self._saved_at = clock()

    @property
    def written_bytes(self) -> int:
        """Bytes of the parts that are written."""
        return sum(part.bytes for part in self.parts.values())

    def add(self, part: WrittenPart) -> None:
        """Add a part that was written."""
        self.parts[part.number] = part
        if self._clock() - self._saved_at >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the journal now."""
        fields = {
            "format": _FORMAT,
            "content": self._content,
            "token": self.target.token,
            "parts": [asdict(part) for part in self.parts.values()],
        }
        self._storage.write(self._place, json.dumps(fields).encode())
        self.is_saved, self._saved_at = True, self._clock()

    def finish(self) -> None:
        """Make the object visible, unless it is. The journal stays until `forget`, so that it can be checked."""
        if self.is_saved and not self.is_visible:
            self.save()
        if not self.is_visible:
            parted_write.finish(self._storage, self.target, list(self.parts.values()))
        self.is_visible = True

    def forget(self) -> None:
        """Remove the journal."""
        if self.is_saved:
            self._storage.delete(self._place)
            self.is_saved = False

    def abandon(self) -> None:
        """Discard what was written and is not visible."""
        parted_write.abandon_all(self._storage, self._url)
        self.forget()

    def _found(self) -> tuple[PartedWrite, list[WrittenPart]] | None:
        """The upload that can be resumed, and those of its parts that the store still holds."""
        try:
            data = self._storage.read(self._place)
        except FileNotFoundError:
            return None
        self.is_saved = True
        try:
            target, parts = self._parsed(data)
        except (ValueError, LookupError, TypeError):  # of another content, or not written by `save`
            return None
        if parts and (kept := parted_write.still_there(self._storage, target, parts)):
            return target, kept
        self.is_visible = bool(parts) and self._has_size(sum(part.bytes for part in parts))
        return (target, parts) if self.is_visible else None

    def _parsed(self, data: bytes) -> tuple[PartedWrite, list[WrittenPart]]:
        """Upload and parts, as `save` wrote them."""
        fields = parsed_object(data)
        if (fields["format"], fields["content"]) != (_FORMAT, self._content):
            raise ValueError("another content")
        return PartedWrite(self._url, str(fields["token"])), [WrittenPart(**part) for part in fields["parts"]]

    def _has_size(self, size: int) -> bool:
        try:
            return self._storage.size(self._url) == size
        except FileNotFoundError:
            return False
