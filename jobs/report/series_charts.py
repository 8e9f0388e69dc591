"""Charts of several runs or variants: curves on one axis, and figures with their deviations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from jobs.report.charts import CANVASES, FAINT, Canvas, drawn_svg, prepare

# Of one lightness, so that each can be read on a light and on a dark page; dashes tell more of them apart.
_COLOURS = ("#4e79c4", "#e0792b", "#3f9b57", "#d1495b", "#9568b8", "#3a9c9c", "#a5733f", "#b8922a")
_DASHES = ("-", "--", ":", "-.")
MOST_MARKED = 40
"""Points of a curve that are marked one by one."""


@dataclass(frozen=True)
class Curve:
    """One line."""

    name: str
    places: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Dot:
    """A figure over seeds."""

    name: str
    values: Sequence[float]
    controls: Sequence[float]
    """The same of random weights."""


def curves_chart(curves: Sequence[Curve], *, title: str, axis: str) -> str:
    """Curves on one axis, for wide and narrow pages; empty where none has a point."""
    drawn = [curve for curve in curves if len(curve.places)]
    return "".join(_curves(drawn, title, axis, canvas) for canvas in CANVASES) if drawn else ""


def dots_chart(dots: Sequence[Dot], *, title: str) -> str:
    """A row for each variant: its seeds, their mean and deviation, and random weights; empty without figures."""
    drawn = [dot for dot in dots if dot.values]
    return "".join(_dots(drawn, title, canvas) for canvas in CANVASES) if drawn else ""


def _curves(curves: Sequence[Curve], title: str, axis: str, canvas: Canvas) -> str:
    rows = -(-len(curves) // max(1, canvas.width_pixels // 220))
    height = canvas.panel_pixels + 18 * rows
    figure = Figure(figsize=(canvas.width_pixels / 72, height / 72), dpi=72, layout="constrained")
    panel = figure.subplots()
    prepare(panel, title)
    for number, curve in enumerate(curves):
        style = _DASHES[number // len(_COLOURS) % len(_DASHES)]
        colour = _COLOURS[number % len(_COLOURS)]
        marker = "o" if len(curve.places) <= MOST_MARKED else ""  # one alone would not be seen
        panel.plot(
            curve.places,
            curve.values,
            style,
            color=colour,
            linewidth=1.6,
            marker=marker,
            markersize=3,
            label=curve.name,
        )
    panel.set_xlabel(axis, color=FAINT, fontsize=11)
    columns = max(1, canvas.width_pixels // 220)
    figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=10, labelcolor=FAINT)
    return drawn_svg(figure, canvas, f"{title} of {len(curves)} runs")


def _dots(dots: Sequence[Dot], title: str, canvas: Canvas) -> str:
    height = 60 + 26 * len(dots)
    figure = Figure(figsize=(canvas.width_pixels / 72, height / 72), dpi=72, layout="constrained")
    panel = figure.subplots()
    prepare(panel, title)
    for row, dot in enumerate(dots):
        mean = sum(dot.values) / len(dot.values)
        panel.plot(dot.controls, [row] * len(dot.controls), "x", color=FAINT, markersize=5, clip_on=False)
        panel.plot([min(dot.values), max(dot.values)], [row, row], color=_COLOURS[0], linewidth=1.4)
        panel.plot(dot.values, [row] * len(dot.values), "o", color=_COLOURS[0], markersize=4, alpha=0.6)
        panel.plot([mean], [row], "D", color=_COLOURS[0], markersize=6)
    panel.set_yticks(range(len(dots)), [dot.name for dot in dots])
    panel.set_ylim(len(dots) - 0.5, -0.5)
    return drawn_svg(figure, canvas, f"{title} of {len(dots)} variants")
