"""What a rank does with the monitor's answers, which come when they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from jobs.rank.monitor_line import MonitorLine
from jobs.step.step_reading import StepReading


class Answering:
    """A monitor in whose place a test answers: every method's `remote` returns its name with its arguments."""

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": staticmethod(lambda *words, **named: (name, *words))})


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What each method of the monitor answers; none yet where it is missing, and an exception is raised."""
    given: dict[str, object] = {}

    def get(reply: Any) -> object:
        if isinstance(reply, list):
            return [get(each) for each in reply]
        answer = given[reply[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.wait", lambda replies, timeout: ([each for each in replies if each[0] in given], []))
    yield given


def line() -> MonitorLine:
    monitor: Any = Answering()
    return MonitorLine(monitor)


def report(rank: MonitorLine) -> None:
    figures: Any = ()
    rank.report_step({"step": 1}, 0.5, StepReading(), figures)


def test_an_answer_is_followed_once_it_is_there_and_once(answers: dict[str, object]) -> None:
    rank = line()
    report(rank)
    assert rank.instruction() == "", "it is not there, and not waited for"

    answers["record"] = "save"

    assert [rank.instruction(), rank.instruction()] == ["save", ""]


def test_an_instruction_that_the_save_follows_is_not_read_again(answers: dict[str, object]) -> None:
    """The monitor repeats it until it hears of the save; the step before that may bring it once more."""
    rank = line()
    answers["record"] = "save"
    report(rank)

    rank.settle()

    assert rank.instruction() == ""


def test_the_ledger_of_replaced_samples_is_waited_for(answers: dict[str, object]) -> None:
    rank = line()
    rank.quarantine([{"id": 3}])

    with pytest.raises(KeyError, match="quarantine"):  # no answer: `ray.get` would wait
        rank.settle()
    answers["quarantine"] = None
    rank.settle()


@pytest.mark.parametrize("ask", [MonitorLine.settle, MonitorLine.instruction])
def test_a_monitor_that_died_is_noticed_before_the_save(answers: dict[str, object], ask: Any) -> None:
    """It took the newest rows of the history along: the steps must be done again."""
    rank = line()
    answers["record"] = RuntimeError("the actor died")
    report(rank)

    with pytest.raises(RuntimeError, match="the actor died"):
        ask(rank)
