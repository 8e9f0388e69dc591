"""Draws panels of the dashboards from a Prometheus, without Grafana: the picture in the README.

`python -m infra.grafana.draw http://127.0.0.1:9090 RUN OUT.png`, while the run is in Prometheus' memory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter

from infra.grafana.boards import DATA_PLANE, NODES, OVERVIEW, RECOVERY
from infra.grafana.panels import Board, Graph
from pipeline.access.proxies import Proxies

SHOWN = (
    (OVERVIEW, "Loss"),
    (OVERVIEW, "Learning rate"),
    (OVERVIEW, "Gradient norm"),
    (OVERVIEW, "Images per second"),
    (DATA_PLANE, "Waiting for data"),
    (DATA_PLANE, "Throughput"),
    (RECOVERY, "Step"),
    (RECOVERY, "Duration"),
    (NODES, "Memory"),
)
COLUMNS = 3
STEP_SECONDS = 5
RATE_SECONDS = 60
"""What a rate is taken over, in place of Grafana's own choice."""
HOUR_SECONDS = 3600
_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    """One series over time."""

    name: str
    minutes: Sequence[float]
    """Since the first point of the run."""
    values: Sequence[float]


def graph_of(board: Board, title: str) -> Graph:
    """The first graph of that title on a board."""
    panels = (panel for section in board.sections for panel in section.panels)
    return next(panel for panel in panels if isinstance(panel, Graph) and panel.title == title)


def lines(url: str, run: str, graph: Graph, span: tuple[float, float]) -> Iterator[Line]:
    """What Grafana would show of a graph for one run between two Unix times."""
    for query in graph.queries:
        expression = query.expression.replace("$run", run).replace("$__rate_interval", f"{RATE_SECONDS}s")
        for series in _range(url, expression, span):
            name = query.legend
            for label, value in series["metric"].items():
                name = name.replace("{{" + label + "}}", value)
            points = [(float(at), float(value)) for at, value in series["values"]]
            yield Line(name, [(at - span[0]) / 60 for at, _ in points], [value for _, value in points])


def run_span(url: str, run: str) -> tuple[float, float]:
    """First and last Unix time at which a run made steps within the last hour that Prometheus knows of.

    Raises:
        ValueError: There is no such run.
    """
    newest = _get(url, "query", {"query": f'max_over_time(convmae_last_step_timestamp_seconds{{run="{run}"}}[1d])'})
    if not newest:
        raise ValueError(f"Prometheus knows no run {run}")
    end = float(newest[0]["value"][1])
    (steps,) = _range(url, f'convmae_step{{run="{run}"}}', (end - HOUR_SECONDS, end))[:1]
    return float(steps["values"][0][0]), end


def _range(url: str, query: str, span: tuple[float, float]) -> list[Any]:
    fields = {"query": query, "start": str(span[0]), "end": str(span[1]), "step": str(STEP_SECONDS)}
    return _get(url, "query_range", fields)


def _get(url: str, kind: str, fields: dict[str, str]) -> list[Any]:
    opener = build_opener(ProxyHandler(Proxies.from_environment(os.environ).for_endpoint(url)))
    with opener.open(f"{url}/api/v1/{kind}?{urlencode(fields)}", timeout=20) as answer:
        return list(json.load(answer)["data"]["result"])


def draw(url: str, run: str, path: str) -> None:
    """Draw SHOWN for one run into a PNG."""
    span = run_span(url, run)
    rows = -(-len(SHOWN) // COLUMNS)
    picture = Picture(figsize=(12, 2.5 * rows), dpi=110, layout="constrained", facecolor="#111217")
    for number, (board, title) in enumerate(SHOWN, start=1):
        graph = graph_of(board, title)
        axes = picture.add_subplot(rows, COLUMNS, number)
        for line in lines(url, run, graph, span):
            axes.plot(line.minutes, line.values, linewidth=1.2, label=line.name)
        axes.set_xlim(0, (span[1] - span[0]) / 60)
        _dress(axes, graph, f"{board.title.partition(': ')[2]} · {graph.title}")
    picture.savefig(path)


def _dress(axes: Axes, graph: Graph, title: str) -> None:
    grey = "#9fa7b3"
    axes.set_facecolor("#181b1f")
    axes.set_title(title, color="white", fontsize=9, loc="left")
    axes.tick_params(which="both", colors=grey, labelsize=7)
    axes.grid(color="#2c3038", linewidth=0.5)
    axes.set_xlabel("minutes", color=grey, fontsize=7)
    if graph.logarithmic:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _unit_text(value, graph.unit)))
        if graph.floor is not None:
            axes.set_ylim(graph.floor, axes.dataLim.y1 * 1.15 or 1.0)
    axes.legend(fontsize=6, facecolor="#181b1f", edgecolor="#2c3038", labelcolor=grey, loc="best")
    for spine in axes.spines.values():
        spine.set_color("#2c3038")


def _unit_text(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit in ("bytes", "Bps"):
        factor, prefix = next(((factor, prefix) for factor, prefix in _PREFIXES if value >= factor), (1.0, ""))
        return f"{value / factor:.3g} {prefix}B" + ("/s" if unit == "Bps" else "")
    return f"{value:.3g}{' s' if unit == 's' else ''}"


if __name__ == "__main__":
    draw(*sys.argv[1:4])
