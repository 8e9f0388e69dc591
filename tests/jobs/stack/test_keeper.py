from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from jobs.stack import services
from jobs.stack.keeper import BACKOFF_SECONDS, WINDOW_SECONDS, Keeper
from jobs.stack.lock import StackLock
from jobs.stack.ports import choose
from jobs.stack.record import ServiceRecord, Stack, read_stack
from jobs.stack.services import StackSettings


class Clock:
    def __init__(self) -> None:
        self.now_seconds = 0.0

    def __call__(self) -> float:
        return self.now_seconds


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """A stack whose services all end at once."""
    monkeypatch.setattr(services, "command", lambda *_: [sys.executable, "-S", "-c", ""])
    (tmp_path / "logs").mkdir()
    settings = StackSettings("id", tmp_path, tmp_path, choose({}), "key", "secret", "internal", 1, None)
    return Stack(settings, None, {name: ServiceRecord() for name in settings.service_names})


def keeper_of(stack: Stack, clock: Clock) -> Keeper:
    return Keeper(stack, StackLock(stack.settings.home), clock)


def see_death(keeper: Keeper, stack: Stack, name: str) -> None:
    """Let the started service end, then let the keeper notice."""
    process = recorded(stack, name).process
    assert process is not None
    while process.alive():
        time.sleep(0.01)
    os.waitpid(process.pid, 0)
    keeper.tend(name)


def recorded(stack: Stack, name: str) -> ServiceRecord:
    written = read_stack(stack.settings.home)
    assert written is not None
    return written.services[name]


def test_a_death_is_followed_by_a_restart_at_once(stack: Stack) -> None:
    keeper = keeper_of(stack, Clock())
    keeper.tend("s3")
    see_death(keeper, stack, "s3")

    keeper.tend("s3")

    assert recorded(stack, "s3").starts == 2


def test_restarts_back_off_and_the_keeper_gives_up(stack: Stack) -> None:
    clock = Clock()
    keeper = keeper_of(stack, clock)
    keeper.tend("s3")
    for backoff_seconds in BACKOFF_SECONDS:
        see_death(keeper, stack, "s3")
        starts = recorded(stack, "s3").starts
        if backoff_seconds > 0:
            keeper.tend("s3")
            assert recorded(stack, "s3").starts == starts
        clock.now_seconds += backoff_seconds
        keeper.tend("s3")
        assert recorded(stack, "s3").starts == starts + 1

    see_death(keeper, stack, "s3")
    clock.now_seconds += WINDOW_SECONDS
    keeper.tend("s3")

    assert recorded(stack, "s3").gave_up
    assert recorded(stack, "s3").starts == len(BACKOFF_SECONDS) + 1


def test_rare_deaths_never_make_the_keeper_give_up(stack: Stack) -> None:
    clock = Clock()
    keeper = keeper_of(stack, clock)
    keeper.tend("s3")
    for _ in range(len(BACKOFF_SECONDS) + 2):
        see_death(keeper, stack, "s3")
        keeper.tend("s3")
        clock.now_seconds += WINDOW_SECONDS

    assert not recorded(stack, "s3").gave_up
    assert recorded(stack, "s3").starts == len(BACKOFF_SECONDS) + 3
