"""Hypothesis for minutes instead of a hundred examples: each example bounded in time, memory and what it reads.

A target is a function that takes one example and makes its own assertions. It may end in a value, or in a `UserError`
that is fit for a person; whatever else it raises, or takes, is a finding. Examples come in batches, each of one seed:
the seed of the batch in which something was found is printed, and gives the same examples again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.internal.conjecture import providers
from hypothesis.strategies import SearchStrategy

from pipeline.errors import LONGEST_PART, UserError
from pipeline.printable import printable

MINUTES_VARIABLE = "CONVMAE_FUZZ_MINUTES"
SEED_VARIABLE = "CONVMAE_FUZZ_SEED"
MOST_SECONDS = 30.0
"""Of one example, of computing; a hundred times what the slowest takes."""
MOST_WAITS = 4
"""So many times as long may an example take that computes little: the machine may be busy with something else."""
MOST_RESIDENT_BYTES = 512 << 20
MOST_MAPPED_BYTES = 4 << 30
"""Beyond what the process had mapped when the target began: what is more ends in a MemoryError."""
LONGEST_REPORTED = 3 * LONGEST_PART + 400
"""Characters of an error for a person."""
LONGEST_SHOWN = 2000

T = TypeVar("T")


class TookTooLong(BaseException):
    """An example that did not end. Not an Exception, so that no handler on its way catches it."""


@dataclass(frozen=True)
class Budget:
    """The time for which a target is tried, and the first seed."""

    seed: int
    seconds: float = 0.0
    """0: one batch."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], targets: int) -> Budget:
        """By CONVMAE_FUZZ_MINUTES, shared evenly between the targets; without it, one batch of the same examples."""
        minutes = float(environ.get(MINUTES_VARIABLE) or 0.0)
        chosen = random.SystemRandom().randrange(10**9) if minutes else 0
        return cls(int(environ.get(SEED_VARIABLE) or chosen), 60.0 * minutes / max(1, targets))


@dataclass
class Hunt:
    """The result of one target."""

    target: str
    first_seed: int
    seed: int
    """Of the batch that was tried last."""
    examples: int = 0
    refused: int = 0
    """Examples that ended in a UserError."""
    seconds: float = 0.0
    found: str = ""
    """The finding's type and first line; empty where there is none."""

    @property
    def line(self) -> str:
        """For a person."""
        seeds = f"seed {self.seed}" if self.seed == self.first_seed else f"seeds {self.first_seed} to {self.seed}"
        tried = f"{self.examples} examples in {self.seconds:.0f} s, {self.refused} of them refused ({seeds})"
        replay = f"; {SEED_VARIABLE}={self.seed} gives it again" if self.found else ""
        return f"{self.target}: {tried}; found {self.found or 'nothing'}{replay}"


@dataclass(frozen=True)
class Fuzz:
    """A fuzzer of targets within a budget."""

    budget: Budget
    on_end: Callable[[Hunt], None] = lambda _: None
    """Called with the result of each."""

    def __call__(
        self,
        target: Callable[[T], object],
        examples: SearchStrategy[T],
        *,
        batch: int,
        most_seconds: float = MOST_SECONDS,
        most_bytes: int = MOST_RESIDENT_BYTES,
    ) -> Hunt:
        """Try a target until its time is over, or something is found. Long by its arguments alone.

        Args:
            target: Ends in a value or a UserError.
            examples: What it is given.
            batch: Examples of one seed; about a second's worth.
            most_seconds: Of one example.
            most_bytes: By which one example may make the process larger.

        Raises:
            Exception: What the target raised on the smallest example that was found.
            TookTooLong: An example did not end.
        """
        hunt = Hunt(target.__name__, self.budget.seed, self.budget.seed)

        def check(value: T) -> None:
            hunt.examples += 1
            with bounded(value, most_seconds, most_bytes):
                try:
                    target(value)
                except UserError as error:
                    hunt.refused += 1
                    check_reported(error)

        began = time.monotonic()
        try:
            with _mapped_at_most(MOST_MAPPED_BYTES), _no_local_constants():
                while True:
                    _try_batch(check, examples, hunt.seed, batch)
                    if time.monotonic() - began >= self.budget.seconds:
                        return hunt
                    hunt.seed += 1
        except BaseException as error:
            hunt.found = f"{type(error).__name__}: {printable(str(error).partition(chr(10))[0][:200])}"
            raise
        finally:
            hunt.seconds = time.monotonic() - began
            self.on_end(hunt)


def _try_batch(check: Callable[[Any], None], examples: SearchStrategy[Any], seed: int, batch: int) -> None:
    phases = (Phase.generate, Phase.shrink)
    as_it_comes = hypothesis.settings(
        max_examples=batch, database=None, deadline=None, phases=phases, suppress_health_check=list(HealthCheck)
    )
    hypothesis.seed(seed)(as_it_comes(hypothesis.given(examples)(check)))()


def check_reported(error: UserError) -> None:
    """Check that an error names field, rule, value and remedy in one line that a terminal can show."""
    text = str(error)
    assert text == printable(text), f"an error that is not one line of printable text: {text!r}"
    assert len(text) <= LONGEST_REPORTED, f"an error of {len(text)} characters: {text[:LONGEST_SHOWN]}"
    for name in ("field", "rule", "remedy"):
        assert str(getattr(error, name)).strip(), f"an error without a {name}: {text}"


@contextlib.contextmanager
def bounded(value: object, most_seconds: float, most_bytes: int) -> Iterator[None]:
    """Raise where what is done in the block takes too long, or more memory than it should.

    In the main thread alone. What is stuck in C for twice as long as may be waited ends the process, with the stacks of
    all threads.
    """
    began, computed = time.monotonic(), time.process_time()

    def too_long(_: int, frame: FrameType | None) -> None:
        waited = time.monotonic() - began
        if time.process_time() - computed < most_seconds / 2 and waited < MOST_WAITS * most_seconds:
            return
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "nowhere"
        raise TookTooLong(f"more than {waited:.1f} s, at {where}: {repr(value)[:LONGEST_SHOWN]}")

    before = signal.signal(signal.SIGALRM, too_long)
    _reset_peak()
    resident = _status_bytes("VmRSS")
    faulthandler.dump_traceback_later(2 * MOST_WAITS * most_seconds, exit=True)
    signal.setitimer(signal.ITIMER_REAL, most_seconds, most_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
    grown = _status_bytes("VmHWM") - resident
    assert grown <= most_bytes, f"{grown} bytes of memory, more than {most_bytes}"


def _status_bytes(name: str) -> int:
    with Path("/proc/self/status").open() as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    """Reset the peak that VmHWM reports: Linux, proc(5)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def _mapped_at_most(more_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status_bytes("VmSize") + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _no_local_constants() -> Iterator[None]:
    """Hypothesis draws constants of the modules that happen to be imported: a seed would not give the same again."""
    found, none = providers._get_local_constants, providers.Constants()
    providers._get_local_constants = lambda: none
    try:
        yield
    finally:
        providers._get_local_constants = found


# What an example reads


_READS = frozenset({"open", "os.listdir", "os.scandir"})
"""Of the interpreter's audit events."""
_watching: list[Callable[[str], None]] = []


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in _READS and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        for note in _watching:
            note(path)


@contextlib.contextmanager
def reading_only(*roots: Path) -> Iterator[None]:
    """Raise where a file is opened in the block that lies neither below the roots nor in what Python itself reads."""
    if _note_opened not in _hooks:
        sys.addaudithook(_note_opened)
        _hooks.append(_note_opened)
    own = {sys.prefix, sys.base_prefix, *sys.path, "/proc", "/dev", "/sys", "/usr", "/lib", "/etc/ssl"}
    allowed = [os.path.realpath(place) for place in (*own, *roots) if place]
    outside: list[str] = []

    def note(path: str) -> None:
        if not any(path == place or path.startswith(f"{place}/") for place in allowed):
            outside.append(path)

    _watching.append(note)
    try:
        yield
    finally:
        _watching.remove(note)
    assert not outside, f"files outside of the root were opened: {outside}"


_hooks: list[object] = []
