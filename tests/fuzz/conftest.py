"""The budget of the fuzzers, and a line of each at the end."""

from __future__ import annotations

import os
from typing import Any

import pytest
from fuzzing import MINUTES_VARIABLE, SEED_VARIABLE, Budget, Fuzz, Hunt

BUDGET = pytest.StashKey[Budget]()
PROPERTY = "fuzz"
"""Of a test's report: the line of a target."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fuzzers bound each example themselves, and take as long as their budget says."""
    for item in _fuzzers(items):
        item.add_marker(pytest.mark.fuzz)
        item.add_marker(pytest.mark.timeout(0))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Share the time between the targets that were chosen."""
    targets = len(_fuzzers(session.items))
    budget = session.config.stash[BUDGET] = Budget.from_environment(os.environ, targets)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if budget.seconds and reporter:
        each = f"{targets} targets, {budget.seconds:.0f} s each; {MINUTES_VARIABLE} sets the minutes of all together"
        reporter.write_line(f"fuzzing: {each}; {SEED_VARIABLE}={budget.seed} gives the same examples again")


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Fuzz:
    """The fuzzer of a target, within the budget."""

    def report(hunt: Hunt) -> None:
        request.node.user_properties.append((PROPERTY, hunt.line))

    return Fuzz(request.config.stash[BUDGET], on_end=report)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a target."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    lines = [text for report in reports for name, text in report.user_properties if name == PROPERTY]
    if lines:
        terminalreporter.section("fuzzing")
        for line in lines:
            terminalreporter.write_line(line)


def _fuzzers(items: list[pytest.Item]) -> list[pytest.Item]:
    return [item for item in items if "fuzz" in getattr(item, "fixturenames", ())]
