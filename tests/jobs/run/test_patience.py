from __future__ import annotations

import logging

import pytest

from jobs.errors import ClusterError, PortTakenError, RecipeError
from jobs.run.patience import persevere


class Away:
    """Raises until `back_at`, by a clock that moves only during sleeps."""

    def __init__(self, error: Exception, back_at: float) -> None:
        self.error, self.back_at, self.now, self.attempts = error, back_at, 0.0, 0

    def attempt(self) -> str:
        self.attempts += 1
        if self.now < self.back_at:
            raise self.error
        return "there"

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def waited(self, seconds: float, passes: type[Exception]) -> str:
        return persevere(self.attempt, passes, seconds, clock=lambda: self.now, sleep=self.sleep)


TAKEN = PortTakenError("metrics_port", "must be free", 9400, "choose another")


def test_what_is_briefly_unavailable_is_waited_for_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    away = Away(TAKEN, back_at=20)

    with caplog.at_level(logging.WARNING):
        assert away.waited(120, PortTakenError) == "there"

    assert [record.getMessage() for record in caplog.records] == [
        "waits up to 120 s: metrics_port: must be free, got 9400; choose another",
        "waited 20 s; continuing",
    ]


def test_patience_ends_with_the_last_error(caplog: pytest.LogCaptureFixture) -> None:
    away = Away(TAKEN, back_at=500)

    with pytest.raises(PortTakenError):
        away.waited(120, PortTakenError)

    assert 118 <= away.now <= 120


@pytest.mark.parametrize(
    ("error", "seconds"),
    [(TAKEN, 0.0), (ClusterError("RAY_ADDRESS", "must answer", "", ""), 120.0), (RecipeError("a", "b", 1, "c"), 120.0)],
    ids=["a person waits", "another kind", "the parent of its kind"],
)
def test_some_things_are_not_waited_for(error: Exception, seconds: float, caplog: pytest.LogCaptureFixture) -> None:
    away = Away(error, back_at=10)

    with pytest.raises(type(error)):
        away.waited(seconds, PortTakenError)

    assert (away.attempts, away.now, caplog.records) == (1, 0.0, [])
