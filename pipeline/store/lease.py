"""The exclusive right to write under one URL, held by one process at a time and lost when that process dies.

A lease is a numbered object, `<folder>/claim-000001.json`, made by a conditional write; the highest number counts.
Taking over from a dead holder is making the next number, so that of several that see it dead only one succeeds. No
clock of another machine is trusted: a holder is dead when its beat has not changed for as long as the observer watched,
and a lease is as old as its holder counted.

A number that is kept when its lease ends is a fence: what was made under a lower number was made by a predecessor.

Hand-written, since libraries that lock need a service beside the store (etcd, ZooKeeper, DynamoDB), or one file system
(`fcntl`, filelock). Here the store itself has to do, whichever it is.
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

from pipeline.errors import LeaseHeldError, UserError
from pipeline.host.process_identity import ProcessIdentity
from pipeline.store.json_text import parsed_object
from pipeline.store.storage import Storage

OLDEST_SECONDS = 1e12
"""No lease is as old; one that says so is damaged."""
BEAT_SECONDS = 4.0
DEAD_SECONDS = 30.0
"""Silence after which a holder counts as dead; several beats, since a store may be slow for a moment."""

_NAME = re.compile(r"claim-(\d{6,12})\.json")


@dataclass(frozen=True)
class Holder:
    """The process that made a lease."""

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
        """Read the content of a lease; what an earlier version did not write is unknown."""
        process = content.get("process")
        texts = {name: str(content.get(name, "unknown")) for name in ("token", "work", "user", "host", "since")}
        return cls(process=ProcessIdentity.of_json(process if isinstance(process, dict) else content), **texts)

    @property
    def text(self) -> str:
        """The holder, for people."""
        return f"{self.user}@{self.host} (process {self.process.pid}, {self.work}, since {self.since})"

    def is_dead_here(self) -> bool:
        """Whether it is known to have ended; False where only its silence can tell.

        The host name decides nothing by itself: containers that share it have pids of their own. It is asked too,
        since a virtual machine that was copied while it ran has its original's ids.
        """
        return self.host == socket.gethostname() and self.process.has_ended()


@dataclass(frozen=True)
class StoredLease:
    """A lease as it lies in the store."""

    number: int
    holder: Holder | None
    """None while it is being written."""
    age_seconds: float
    """From its making to its last beat, by the holder's monotonic clock."""
    is_over: bool
    """Whether its holder gave it up, and left the number."""

    @property
    def text(self) -> str:
        """The holder and the age, for people."""
        return f"{self.holder.text if self.holder else 'an unknown process'}; the lease is {self.age_seconds:.0f} s old"

    @classmethod
    def of(cls, number: int, content: Mapping[str, Any]) -> StoredLease:
        """Read the content of a lease."""
        holder = Holder.of(content) if content else None
        age = content.get("age_seconds")
        sound = isinstance(age, int | float) and 0 <= age < OLDEST_SECONDS
        return cls(number, holder, float(age) if sound and age else 0.0, bool(content.get("over")))


class Lease:
    """A lease that this process holds; beats in a thread until it is released.

    Concurrency: safe to call from several threads.
    Failure: when this process dies, the lease is taken over by whoever watches it for DEAD_SECONDS; at once by whoever
        can see that it ended, in the same PID namespace.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        number: int,
        holder: Holder,
        *,
        keeps_number: bool = False,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._storage = storage
        self._folder = folder
        self._number = number
        self._holder = holder
        self._keeps_number = keeps_number
        self._beat_seconds = beat_seconds
        self._began = time.monotonic()
        self._beats = 0
        self._released = threading.Event()
        self._lost_to: str | None = None
        self._thread = threading.Thread(target=self._beat_on, name="lease", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """Higher than those of all leases before."""
        return self._number

    @property
    def holder(self) -> Holder:
        """This process."""
        return self._holder

    @property
    def url(self) -> str:
        """URL of the lease's object."""
        return _url(self._folder, self._number)

    @property
    def first_bytes(self) -> bytes:
        """The beginning of the object while this process holds the lease; no other holder's begins so."""
        content = self._content()
        return content[: content.index(self._holder.token.encode()) + len(self._holder.token)]

    def check(self) -> None:
        """Make sure that it is still held; call before what no other process may do at the same time.

        Raises:
            LeaseHeldError: Another process took over, because this one could not reach the store for too long.
        """
        if self._lost_to is not None:
            remedy = f"this one was silent for more than {DEAD_SECONDS:.0f} s; wait for the other"
            raise LeaseHeldError("destination", f"was taken over by {self._lost_to}", self._folder, remedy)

    def release(self) -> None:
        """Give the lease up, and delete those of the dead before it."""
        self._released.set()
        self._thread.join()
        if self._lost_to is None:
            if self._keeps_number:
                self._storage.write(_url(self._folder, self._number), self._content(over=True))
            last = self._number - self._keeps_number
            for number in sorted(number for number in _numbers(self._storage, self._folder) if number <= last):
                self._storage.delete(_url(self._folder, number))

    def _beat_on(self) -> None:
        while not self._released.wait(self._beat_seconds) and self._lost_to is None:
            with contextlib.suppress(OSError, UserError):  # the next beat tries again; the others cannot read, either
                self.beat()

    def beat(self) -> None:
        """Show that the holder lives, and find out whether it is still the holder."""
        newest = max(_numbers(self._storage, self._folder), default=0)
        current = _read(self._storage, _url(self._folder, self._number))
        if newest != self._number or not current or current.get("token") != self._holder.token:
            newer = _read(self._storage, _url(self._folder, newest))
            self._lost_to = Holder.of(newer).text if newer else "another process, which has finished"
            return
        self._beats += 1
        self._storage.write(_url(self._folder, self._number), self._content())

    def _content(self, over: bool = False) -> bytes:
        return _content(self._holder, self._beats, age_seconds=time.monotonic() - self._began, over=over)


def current_lease(storage: Storage, folder: str) -> StoredLease | None:
    """The newest lease there, whether its holder lives, is dead or gave it up; None where there is none."""
    number = max(_numbers(storage, folder), default=0)
    content = _read(storage, _url(folder, number)) if number else None
    return None if content is None else StoredLease.of(number, content)


@contextlib.contextmanager
def hold_lease(
    storage: Storage,
    folder: str,
    work: str,
    *,
    on_wait: Callable[[str], None],
    keeps_number: bool = False,
    dead_seconds: float = DEAD_SECONDS,
    beat_seconds: float = BEAT_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Lease]:
    """Hold the lease while the context is open.

    Args:
        storage: Reaches the folder.
        folder: Where leases are kept.
        work: What this process will do, reported to those who come second.
        on_wait: Called with the holder's text when this process has to wait to see whether the holder lives.
        keeps_number: Leave the lease's object behind, marked as over, so that the next number is higher.
        dead_seconds: How long a holder is watched before it counts as dead.
        beat_seconds: Between two beats of this process.
        clock: Monotonic seconds.
        sleep: Waits that many seconds.

    Raises:
        LeaseHeldError: Another process works there; names it, and since when.
    """
    holder = Holder.here(work)
    number = _took_number(_Watch(storage, folder, dead_seconds, on_wait, clock, sleep), holder)
    lease = Lease(storage, folder, number, holder, keeps_number=keeps_number, beat_seconds=beat_seconds)
    try:
        yield lease
    finally:
        lease.release()


@dataclass(frozen=True)
class _Watch:
    """A process that wants a lease and looks at whoever holds it."""

    storage: Storage
    folder: str
    dead_seconds: float
    on_wait: Callable[[str], None]
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    def is_dead(self, number: int) -> bool:
        """Watch a lease until it moves, vanishes or counts as dead; False if it vanished.

        Raises:
            LeaseHeldError: It moved.
        """
        first = _read(self.storage, _url(self.folder, number))
        if first is None:  # some stores list what was deleted a moment ago
            return True
        began, reported = self.clock(), False
        while True:
            now = _read(self.storage, _url(self.folder, number))
            if now is None:
                return False
            found = StoredLease.of(number, now)
            holder = found.holder
            if found.is_over:
                return True
            if now != first and holder:
                remedy = "wait for it to end, or take another destination"
                raise LeaseHeldError("destination", f"must not be in use by {found.text}", self.folder, remedy)
            if (holder and holder.is_dead_here()) or self.clock() - began >= self.dead_seconds:
                return True
            if not reported:
                self.on_wait(holder.text if holder else "an unknown process")
                reported = True
            self.sleep(min(1.0, self.dead_seconds / 10))


def _took_number(watch: _Watch, holder: Holder) -> int:
    """The number of a lease that was made for `holder`, once no other one lives."""
    storage, folder = watch.storage, watch.folder
    while True:
        newest = max(_numbers(storage, folder), default=0)
        if newest and not watch.is_dead(newest):
            continue
        number = newest + 1
        made = storage.create(_url(folder, number), _content(holder, 0))
        # A store without conditional writes may have let two of us through; the last one's content remains.
        if made and (_read(storage, _url(folder, number)) or {}).get("token") == holder.token:
            return number


def _url(folder: str, number: int) -> str:
    return Storage.join(folder, f"claim-{number:06d}.json")


def _numbers(storage: Storage, folder: str) -> list[int]:
    found = map(_NAME.fullmatch, storage.list_names(folder))
    return [int(match[1]) for match in found if match]


def _content(holder: Holder, beat: int, *, age_seconds: float = 0.0, over: bool = False) -> bytes:
    state = {"beat": beat, "age_seconds": round(age_seconds, 1), "over": over}
    return json.dumps({**asdict(holder), **state}).encode()


def _read(storage: Storage, url: str) -> dict[str, Any] | None:
    """The content of a lease; None where there is none, empty while it is being written, or where it is damaged."""
    try:
        data = storage.read(url)
    except FileNotFoundError:
        return None
    try:
        return parsed_object(data)
    except ValueError:  # not around the read: what a store refuses is a ValueError, too
        return {}


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container whose user id has no name
        return str(os.getuid())
