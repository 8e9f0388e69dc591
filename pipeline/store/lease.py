"""The exclusive right to write under one URL, held by one process at a time and lost when that process dies.

Claims are numbered objects, `<folder>/claim-000001.json`, made by conditional writes; the highest number rules. Taking
over from a dead holder is making the next number, so of several that see it dead only one succeeds. No clock of another
machine is trusted: a holder is dead when its beat has not changed for as long as the observer watched, and a claim is
as old as its holder counted.

A number that is kept when its claim ends fences: what was made under a lower number was made by a predecessor.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import ClaimedError, UserError
from pipeline.host.process_identity import ProcessIdentity
from pipeline.store.json_text import parsed_object
from pipeline.store.storage import Storage

OLDEST_SECONDS = 1e12
"""No claim is as old; one that says so is damaged."""
BEAT_SECONDS = 4.0
DEAD_SECONDS = 30.0
"""Silence after which a holder counts as dead; several beats, since a store may be slow for a moment."""

_NAME = re.compile(r"claim-(\d{6,12})\.json")


@dataclass(frozen=True)
class Holder:
    """Who made a claim."""

    token: str
    work: str
    """What it does there, for the message."""
    user: str
    host: str
    process: ProcessIdentity
    since: str
    """UTC, by the holder's clock."""

    @classmethod
    def here(cls, work: str) -> Holder:
        """This process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(uuid.uuid4().hex, work, _user(), socket.gethostname(), ProcessIdentity.here(), since)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Holder:
        """Read the content of a claim; what an earlier version did not write is not known."""
        process = content.get("process")
        texts = {name: str(content.get(name, "unknown")) for name in ("token", "work", "user", "host", "since")}
        return cls(process=ProcessIdentity.of_json(process if isinstance(process, dict) else content), **texts)

    @property
    def text(self) -> str:
        """For a person."""
        return f"{self.user}@{self.host} (process {self.process.pid}, {self.work}, since {self.since})"

    def is_dead_here(self) -> bool:
        """Whether it is known to have ended; False where only its silence can tell.

        The host name decides nothing by itself: containers that share it have pids of their own. It is asked too,
        since a virtual machine that was copied while it ran has its original's ids.
        """
        return self.host == socket.gethostname() and self.process.has_ended()


@dataclass(frozen=True)
class Standing:
    """A claim as it lies in the store."""

    number: int
    holder: Holder | None
    """None while it is being written."""
    age_seconds: float
    """From its making to its last beat, by the holder's monotonic clock."""
    is_over: bool
    """Whether its holder gave it up, and left the number."""

    @property
    def text(self) -> str:
        """For a person: who holds it, and for how long."""
        return f"{self.holder.text if self.holder else 'an unknown process'}; the lease is {self.age_seconds:.0f} s old"

    @classmethod
    def of(cls, number: int, content: Mapping[str, Any]) -> Standing:
        """Read the content of a claim."""
        holder = Holder.of(content) if content else None
        age = content.get("age_seconds")
        sound = isinstance(age, int | float) and 0 <= age < OLDEST_SECONDS
        return cls(number, holder, float(age) if sound and age else 0.0, bool(content.get("over")))


class Claim:
    """A claim that this process holds; beats in a thread until it is released.

    Concurrency: safe to call from several threads.
    Failure: when this process dies the claim is taken over by whoever asks DEAD_SECONDS later; at once by who can see
        that it ended, in the same PID namespace.
    """

    def __init__(
        self, storage: Storage, folder: str, number: int, holder: Holder, *, keeps_number: bool = False
    ) -> None:
        self._storage = storage
        self._folder = folder
        self._number = number
        self._holder = holder
        self._keeps_number = keeps_number
        self._began = time.monotonic()
        self._beats = 0
        self._released = threading.Event()
        self._lost_to: str | None = None
        self._thread = threading.Thread(target=self._beat_on, name="claim", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """Higher than those of all claims before."""
        return self._number

    @property
    def holder(self) -> Holder:
        """This process."""
        return self._holder

    @property
    def url(self) -> str:
        """Of the claim's object."""
        return _url(self._folder, self._number)

    @property
    def first_bytes(self) -> bytes:
        """What the object begins with for as long as this process holds it, and no other one does."""
        content = self._content()
        return content[: content.index(self._holder.token.encode()) + len(self._holder.token)]

    def check(self) -> None:
        """Call before what nobody else may do at the same time.

        Raises:
            ClaimedError: Another process took over, because this one did not reach the store for too long.
        """
        if self._lost_to is not None:
            remedy = f"this one was silent for more than {DEAD_SECONDS:.0f} s; wait for the other"
            raise ClaimedError("destination", f"was taken over by {self._lost_to}", self._folder, remedy)

    def release(self) -> None:
        """Give the claim up, and sweep away those of the dead before it."""
        self._released.set()
        self._thread.join()
        if self._lost_to is None:
            if self._keeps_number:
                self._storage.write(_url(self._folder, self._number), self._content(over=True))
            last = self._number - self._keeps_number
            for number in sorted(number for number in _numbers(self._storage, self._folder) if number <= last):
                self._storage.delete(_url(self._folder, number))

    def _beat_on(self) -> None:
        while not self._released.wait(BEAT_SECONDS) and self._lost_to is None:
            with contextlib.suppress(OSError, UserError):  # the next beat tries again; the others cannot read either
                self.beat()

    def beat(self) -> None:
        """Show that the holder lives, and find out whether it still is the holder."""
        newest = max(_numbers(self._storage, self._folder), default=0)
        current = _read(self._storage, _url(self._folder, self._number))
        if newest != self._number or not current or current.get("token") != self._holder.token:
            ruler = _read(self._storage, _url(self._folder, newest))
            self._lost_to = Holder.of(ruler).text if ruler else "another process, which has finished"
            return
        self._beats += 1
        self._storage.write(_url(self._folder, self._number), self._content())

    def _content(self, over: bool = False) -> bytes:
        return _content(self._holder, self._beats, age_seconds=time.monotonic() - self._began, over=over)


def standing(storage: Storage, folder: str) -> Standing | None:
    """The claim that rules there, of the living, the dead or one that is over; None where there is none."""
    number = max(_numbers(storage, folder), default=0)
    content = _read(storage, _url(folder, number)) if number else None
    return None if content is None else Standing.of(number, content)


@contextlib.contextmanager
def claimed(
    storage: Storage,
    folder: str,
    work: str,
    *,
    on_wait: Callable[[str], None],
    keeps_number: bool = False,
    dead_seconds: float = DEAD_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Claim]:
    """Hold the claim while the context is open.

    Args:
        storage: Reaches the folder.
        folder: Where claims are kept.
        work: What this process will do, told to those who come second.
        on_wait: Called with the holder's text when it is to be seen whether the holder lives.
        keeps_number: Leave the claim's object behind, marked as over, so that the next number is higher.
        dead_seconds: How long a holder is watched before it counts as dead.
        clock: Monotonic seconds.
        sleep: Waits that many seconds.

    Raises:
        ClaimedError: Another process works there; names it, and since when.
    """
    holder = Holder.here(work)
    while True:
        newest = max(_numbers(storage, folder), default=0)
        if newest and not _is_dead(
            storage, folder, newest, dead_seconds=dead_seconds, on_wait=on_wait, clock=clock, sleep=sleep
        ):
            continue
        number = newest + 1
        made = storage.create(_url(folder, number), _content(holder, 0))
        # A store without conditional writes may have let two of us through; the last one's content remains.
        if made and (_read(storage, _url(folder, number)) or {}).get("token") == holder.token:
            break
    claim = Claim(storage, folder, number, holder, keeps_number=keeps_number)
    try:
        yield claim
    finally:
        claim.release()


def _is_dead(
    storage: Storage,
    folder: str,
    number: int,
    *,
    dead_seconds: float,
    on_wait: Callable[[str], None],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> bool:
    """Watch a claim until it moves, vanishes or counts as dead; False if it vanished.

    Raises:
        ClaimedError: It moved.
    """
    first = _read(storage, _url(folder, number))
    if first is None:  # some stores list what was deleted a moment ago
        return True
    began, told = clock(), False
    while True:
        now = _read(storage, _url(folder, number))
        if now is None:
            return False
        found = Standing.of(number, now)
        holder = found.holder
        if found.is_over:
            return True
        if now != first and holder:
            remedy = "wait for it to end, or take another destination"
            raise ClaimedError("destination", f"must not be worked on by {found.text}", folder, remedy)
        if (holder and holder.is_dead_here()) or clock() - began >= dead_seconds:
            return True
        if not told:
            on_wait(holder.text if holder else "an unknown process")
            told = True
        sleep(min(1.0, dead_seconds / 10))


def _url(folder: str, number: int) -> str:
    return Storage.join(folder, f"claim-{number:06d}.json")


def _numbers(storage: Storage, folder: str) -> list[int]:
    found = map(_NAME.fullmatch, storage.list_names(folder))
    return [int(match[1]) for match in found if match]


def _content(holder: Holder, beat: int, *, age_seconds: float = 0.0, over: bool = False) -> bytes:
    state = {"beat": beat, "age_seconds": round(age_seconds, 1), "over": over}
    return json.dumps({**asdict(holder), **state}).encode()


def _read(storage: Storage, url: str) -> dict[str, Any] | None:
    """The content of a claim; None where there is none, empty while it is being written, or where it is damaged."""
    try:
        data = storage.read(url)
    except FileNotFoundError:
        return None
    try:
        return parsed_object(data)
    except ValueError:  # not around the reading: what a store refuses is a ValueError, too
        return {}


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container whose user id has no name
        return str(os.getuid())
