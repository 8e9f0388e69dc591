"""How our panels look: a few builders on top of Grafana's Foundation SDK, so that boards read as lists of queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${source}")
"""The Prometheus that the reader of a dashboard chose."""
RUN = 'run=~"$run"'
"""Selects the runs that the reader chose; part of every query of our own series."""
TAG = "convmae"
REF_IDS = "ABCDEFGH"


@dataclass(frozen=True)
class Query:
    """PromQL and the text that names its series."""

    expression: str
    legend: str = "{{run}}"


@dataclass(frozen=True)
class Graph:
    """Series over time."""

    title: str
    about: str
    """What it shows and what good looks like."""
    unit: str
    """Grafana's name of the unit: `s`, `bytes`, `percentunit`, `short` ..."""
    queries: Sequence[Query]
    width: int = 8
    logarithmic: bool = False
    floor: float | None = 0.0
    """Least value of the axis; None: chosen by Grafana."""


@dataclass(frozen=True)
class Figure:
    """One number for each run, as it is now."""

    title: str
    about: str
    unit: str
    query: Query
    limits: Mapping[float, str] | None = None
    """Colours from these values on; below the first it is green."""
    width: int = 4
    decimals: int | None = None


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    panels: Sequence[Graph | Figure]


@dataclass(frozen=True)
class Board:
    """One dashboard."""

    uid: str
    """Also the name of its file; links and bookmarks stay valid while it does."""
    title: str
    about: str
    sections: Sequence[Section]


def built(board: Board) -> models.Dashboard:
    """The dashboard as Grafana knows it."""
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags([TAG])
        .refresh("10s")
        .time("now-6h", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(dashboard.DashboardLink("ConvMAE").type(models.DashboardLinkType.DASHBOARDS).tags([TAG]).keep_time(True))
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .query("label_values(convmae_total_steps, run)")
            .datasource(SOURCE)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    identity = 1
    for section in board.sections:
        builder = builder.with_row(dashboard.Row(section.title).id(identity))
        for number, panel in enumerate(section.panels, start=identity + 1):
            made = _graph(panel) if isinstance(panel, Graph) else _figure(panel)
            builder = builder.with_panel(made.id(number))
        identity += 1 + len(section.panels)
    return builder.build()


def _graph(graph: Graph) -> Any:
    panel = (
        timeseries.Panel()
        .title(graph.title)
        .description(graph.about)
        .datasource(SOURCE)
        .unit(graph.unit)
        .span(graph.width)
        .height(8)
        .line_width(1)
        .fill_opacity(8)
        .show_points(common_models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull"])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(common_models.TooltipDisplayMode.MULTI)
            .sort(common_models.SortOrder.DESCENDING)
        )
    )
    if graph.logarithmic:
        scale = common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10)
        panel = panel.scale_distribution(scale)
    elif graph.floor is not None:
        panel = panel.min(graph.floor)
    for name, query in zip(REF_IDS, graph.queries, strict=False):
        panel = panel.with_target(
            prometheus.Dataquery().ref_id(name).expr(query.expression).legend_format(query.legend).range()
        )
    return panel


def _figure(figure: Figure) -> Any:
    # Grafana takes the first colour below its value, too; no value at all, its own editor's way, breaks its schema.
    steps = [models.Threshold(value=0, color="green")]
    steps += [models.Threshold(value=value, color=color) for value, color in (figure.limits or {}).items()]
    query = (
        prometheus.Dataquery().ref_id("A").expr(figure.query.expression).legend_format(figure.query.legend).instant()
    )
    panel = (
        stat.Panel()
        .title(figure.title)
        .description(figure.about)
        .datasource(SOURCE)
        .unit(figure.unit)
        .span(figure.width)
        .height(4)
        .color_mode(common_models.BigValueColorMode.VALUE)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(query)
    )
    return panel if figure.decimals is None else panel.decimals(figure.decimals)
