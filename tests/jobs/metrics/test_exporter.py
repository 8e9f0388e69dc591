from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from probe_events import probe_events
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from jobs.metrics.exporter import (
    COUNTERS,
    GAUGES,
    LABELLED_COUNTERS,
    RANKS_SILENT_SECONDS,
    RANKS_SILENT_STEPS,
    RankSeries,
    RunExporter,
)
from jobs.metrics.rank_figures import RankFigures
from jobs.run.probe_rows import ProbeCurve

DOCS = Path(__file__).parents[3] / "docs" / "reference.md"


def families(exporter: RunExporter) -> Iterator[Metric]:
    with urllib.request.urlopen(exporter.url, timeout=5) as answer:
        yield from text_string_to_metric_families(answer.read().decode())


@pytest.fixture
def full() -> RunExporter:
    """An exporter with a value in every series."""
    exporter = RunExporter("first", "127.0.0.1", 0)
    exporter.update(dict.fromkeys(GAUGES, 1.0))
    exporter.update_ranks([RankFigures(), RankFigures()])
    for name in COUNTERS:
        exporter.count(name, 1)
    for name in LABELLED_COUNTERS:
        exporter.count(name, 1, "why")
    exporter.probed(ProbeCurve.of(probe_events({0: 0.25, 8: 0.5})))
    exporter.recovered({"detect": 0.5, "down": 8.0})
    return exporter


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels of each series in the table of docs/reference.md."""
    section = DOCS.read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    rows = {}
    for line in section.splitlines():
        if not line.startswith("| `convmae_"):
            continue
        names, kind, unit, labels, good = (cell.strip() for cell in line.strip("|").split("|"))
        assert unit, f"{names}: no unit"
        assert good, f"{names}: what does good look like?"
        for name in re.findall(r"`(\w+)`", names):
            assert name not in rows, f"{name} is there twice"
            rows[name] = (kind, frozenset(re.findall(r"`(\w+)`", labels.partition(":")[0])) | {"run"})
    return rows


def test_the_documented_series_are_those_that_are_served(full: RunExporter) -> None:
    served = {}
    for family in families(full):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {frozenset(sample.labels) for sample in family.samples}
        assert len(labels) == 1, f"{name} is served with {labels}"
        served[name] = (family.type, next(iter(labels)))

    assert documented() == served


def test_names_and_labels_are_of_the_agreed_form(full: RunExporter) -> None:
    for family in families(full):
        assert re.fullmatch(r"convmae(_[a-z]+)+", family.name)
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert set(sample.labels) <= {"run", "rank", "reason", "cause", "phase", "probe"}


def test_what_is_not_known_has_no_series(full: RunExporter) -> None:
    full.update({"loss": None, "step": 7})

    served = {family.name: family.samples for family in families(full)}

    assert not served["convmae_loss"]
    assert [sample.value for sample in served["convmae_step"]] == [7]
    assert [sample.value for sample in served["convmae_epoch"]] == [1]


@pytest.mark.parametrize("step_seconds", [0.1, 60.0])
def test_ranks_that_fall_silent_have_no_series(step_seconds: float) -> None:
    now = 1000.0
    series = RankSeries("first", clock=lambda: now)
    series.update([RankFigures(step_seconds=step_seconds), RankFigures(step_seconds=step_seconds / 2)])
    patience = max(RANKS_SILENT_SECONDS, RANKS_SILENT_STEPS * step_seconds)

    def ranks() -> set[str]:
        return {sample.labels["rank"] for family in series.collect() for sample in family.samples}

    now += patience - 0.1
    assert ranks() == {"0", "1"}
    now += 0.2
    assert ranks() == set()


def test_a_smaller_group_leaves_no_rank_behind() -> None:
    series = RankSeries("first")
    series.update([RankFigures()] * 3)
    series.update([RankFigures()])

    assert {sample.labels["rank"] for family in series.collect() for sample in family.samples} == {"0"}
