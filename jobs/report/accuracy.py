"""The accuracies of a run as people look at them: a curve and a table."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jobs.report.charts import ACCENT, FAINT, MARK, Canvas, drawn_svg, prepare
from jobs.run.accuracy_rows import AccuracyCurve, AccuracyRow

MOST_ROWS = 60
"""Newest ones that are listed."""


def accuracy_chart(curve: AccuracyCurve, *, epoch_steps: int | None, control: str, canvas: Canvas) -> str:
    """Draw accuracies over epochs, with 95 % intervals, as one `<svg>` element.

    Args:
        curve: At least one row.
        epoch_steps: Steps in an epoch, if known.
        control: What the weights before training are called.
        canvas: Its size.
    """
    figure = Figure(figsize=(canvas.width_pixels / 72, canvas.panel_pixels / 72), dpi=72, layout="constrained")
    panel = figure.subplots()
    prepare(panel, "accuracy", ())
    places = [row.step / (epoch_steps or 1) for row in curve.rows]
    others = iter((FAINT, MARK))
    for name, label in curve.shown.items():
        colour = ACCENT if name == curve.main else next(others)
        values = [row.accuracies[name] for row in curve.rows]
        lows, highs = zip(*(row.interval(name) for row in curve.rows), strict=True)
        panel.plot(places, values, "o-", color=colour, linewidth=1.8, markersize=3, label=label, clip_on=False)
        panel.fill_between(places, lows, highs, color=colour, alpha=0.12, linewidth=0)
    if curve.control:
        level, label = curve.control.accuracies[curve.main], f"{control}, {curve.names[curve.main]}"
        panel.axhline(level, color=ACCENT, linewidth=1, dashes=(3, 3), label=label)
    panel.legend(frameon=False, labelcolor="linecolor", fontsize=11, ncols=2 if canvas.width_pixels > 500 else 1)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.xaxis.set_major_locator(MaxNLocator(max(3, canvas.width_pixels // 110), integer=True))
    panel.set_xlabel("epoch" if epoch_steps else "step", color=FAINT, fontsize=11)
    return drawn_svg(figure, canvas, f"accuracy ({'; '.join(curve.shown.values())}) at {len(curve.rows)} steps")


def accuracy_head(curve: AccuracyCurve) -> tuple[str, ...]:
    """Of the columns of `accuracy_rows`."""
    return "step", "epoch", *curve.shown.values()


def accuracy_rows(curve: AccuracyCurve) -> Iterator[tuple[str, ...]]:
    """Step, epoch, and each accuracy with its interval; the newest first."""
    for row in list(reversed(curve.rows))[:MOST_ROWS]:
        yield f"{row.step:,}", f"{row.epoch:,}", *(_with_interval(row, name) for name in curve.shown)


def _with_interval(row: AccuracyRow, name: str) -> str:
    low, high = row.interval(name)
    return f"{row.accuracies[name]:.1%} ({low:.1%} to {high:.1%})"
