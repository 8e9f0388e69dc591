"""Parts are made on demand, not too often, and outlive what makes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from patience import wait_until

from jobs.report.live import live_parts
from jobs.report.live.live_parts import LATE_SECONDS, Drawn, LiveParts, Snapshot


class Counted:
    """Makes numbered parts; fails while it has a fault."""

    def __init__(self) -> None:
        self.opened = self.made = self.closed = 0
        self.fault = ""

    def draw(self) -> Iterator[Drawn]:
        self.made += 1
        yield Drawn({"number": str(self.made)}, time.time())
        if self.fault:
            raise OSError(self.fault)
        yield Drawn({"slow": "the same"}, time.time())

    def close(self) -> None:
        self.closed += 1

    def open(self) -> Counted:
        self.opened += 1
        return self


@pytest.fixture
def drawer() -> Counted:
    return Counted()


def test_however_many_look_parts_are_made_at_most_every_few_seconds(
    drawer: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_parts, "REFRESH_SECONDS", 0.5)
    parts = LiveParts(drawer.open, "test")
    ends_at = time.monotonic() + 1.4

    def look() -> None:
        while time.monotonic() < ends_at:
            parts.snapshot()
            time.sleep(0.01)

    threads = [threading.Thread(target=look) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert drawer.opened == 1
    assert 2 <= drawer.made <= 3


def test_nothing_is_made_while_nobody_looks(drawer: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_parts, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(live_parts, "IDLE_SECONDS", 0.5)
    parts = LiveParts(drawer.open, "test")
    assert parts.snapshot() == Snapshot()
    wait_until("its close", lambda: drawer.closed == 1, 10)
    assert drawer.made == 1

    assert parts.snapshot().parts["number"][1] == "1"
    wait_until("newer parts", lambda: int(parts.snapshot().parts["number"][1]) > 1, 10)
    assert drawer.opened == 2


def test_what_cannot_be_made_again_stays_and_the_reason_is_given(
    drawer: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_parts, "REFRESH_SECONDS", 0.05)
    parts = LiveParts(drawer.open, "test")
    wait_until("all parts", lambda: "slow" in parts.snapshot().parts, 10)

    drawer.fault = "no answer\x1b"
    wait_until("the fault", lambda: parts.snapshot().fault != "", 10)
    assert parts.snapshot().parts["slow"][1] == "the same"
    assert parts.snapshot().age_text(time.time()).endswith(" ago. no answer\\x1b")

    drawer.fault = ""
    wait_until("its end", lambda: parts.snapshot().fault == "", 10)


def test_names_in_other_encodings_are_shown() -> None:
    shown = Snapshot().with_drawn(Drawn({"faults": "caf\udce9"}, 1.0))

    assert shown.parts["faults"][1] == "caf\udce9"
    assert shown.parts["faults"][0] != Snapshot().with_drawn(Drawn({"faults": "caf\udce8"}, 1.0)).parts["faults"][0]


def test_parts_are_called_old_by_their_age() -> None:
    fresh = Snapshot().with_drawn(Drawn({}, 1_700_000_000.0))

    assert Snapshot().age_text(1.0) == "Reading ..."
    assert fresh.age_text(1_700_000_000.0 + LATE_SECONDS - 1) == ""
    assert fresh.age_text(1_700_000_100.0) == "What is shown is old: of 2023-11-14 22:13:20 UTC, 100 s ago."
