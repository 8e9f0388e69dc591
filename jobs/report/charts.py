"""Charts of a run as SVG for embedding in a page: text stays text, colours are variables of the page.

A run of months has millions of steps and a screen a thousand pixels, so what is drawn was thinned (`History`).
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from jobs.report.curves import History, speeds

# matplotlib writes fixed colours; these stand for CSS variables and are replaced by them.
_INK, FAINT, _RULE, ACCENT, MARK = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "var(--ink)", FAINT: "var(--faint)", _RULE: "var(--rule)", ACCENT: "var(--accent)"}
_VARIABLES[MARK] = "var(--mark)"

_SETTINGS = threading.Lock()
"""Held while matplotlib's settings, which are of the process, are ours."""
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Canvas:
    """A size to draw for; text is as large as that of the page only if the chart is shown at its own width."""

    name: str
    width_pixels: int
    panel_pixels: int


CANVASES = (Canvas("wide", 920, 300), Canvas("narrow", 360, 220))


def training_chart(
    history: History, *, global_batch_size: int, restarts: Sequence[int], epoch_steps: int | None, canvas: Canvas
) -> str:
    """Draw a run over its steps, one panel below the other, as one `<svg>` element.

    Loss and learning rate; images per second and MFU if the history has them; workers if their number changed.

    Args:
        history: At least one step.
        global_batch_size: Images in a step.
        restarts: Steps from which a later attempt resumed; each becomes a vertical line.
        epoch_steps: Steps in an epoch, if known.
        canvas: Its size.
    """
    drawn: list[tuple[str, float, Callable[[Axes, History], None]]] = [
        ("loss", 1.0, _draw_loss),
        ("learning rate", 0.5, _draw_learning_rate),
    ]
    if len(history.mean_step_seconds[0]):
        drawn.append(("images/s", 0.5, partial(_draw_speed, global_batch_size=global_batch_size)))
    if len(history.mean_mfu_ratios[0]):
        drawn.append(("MFU", 0.5, _draw_mfu))
    if np.ptp(history.world_sizes[1]):
        drawn.append(("workers", 0.35, _draw_workers))
    heights = [height for _, height, _ in drawn]
    inches = (canvas.width_pixels / 72, sum(heights) * canvas.panel_pixels / 72)
    figure = Figure(figsize=inches, dpi=72, layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, _, draw) in zip(panels, drawn, strict=True):
        prepare(panel, title, restarts)
        draw(panel, history)
    label = "step" if epoch_steps is None else f"step ({epoch_steps:,} in an epoch)"
    panels[-1].set_xlabel(label, color=FAINT, fontsize=11)
    panels[-1].xaxis.set_major_locator(MaxNLocator(max(3, canvas.width_pixels // 110), integer=True))
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep="") if history.last_step >= 10_000 else "{x:.0f}")
    shown = ", ".join(title for title, *_ in drawn)
    return drawn_svg(figure, canvas, f"{shown} over {len(history):,} steps")


def _draw_learning_rate(panel: Axes, history: History) -> None:
    panel.plot(*history.learning_rates, color=ACCENT, linewidth=1.6)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter("{x:g}")


def _draw_speed(panel: Axes, history: History, global_batch_size: int) -> None:
    panel.plot(*speeds(history, global_batch_size), color=ACCENT, linewidth=1.6)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_mfu(panel: Axes, history: History) -> None:
    panel.plot(*history.mean_mfu_ratios, color=ACCENT, linewidth=1.6)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_workers(panel: Axes, history: History) -> None:
    panel.plot(*history.world_sizes, color=ACCENT, linewidth=1.6, drawstyle="steps-post")
    panel.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    panel.set_ylim(0, history.world_sizes[1].max() * 1.2)


def _draw_loss(panel: Axes, history: History) -> None:
    panel.plot(*history.losses, color=ACCENT, linewidth=1, alpha=0.3)
    panel.plot(*history.mean_losses, color=ACCENT, linewidth=2)
    panel.plot([history.last_step], [history.last_loss], "o", color=ACCENT, markersize=4, clip_on=False)


def prepare(panel: Axes, title: str, restarts: Sequence[int] = ()) -> None:
    """Give a panel its title and the look of all; each restart becomes a vertical line."""
    panel.set_title(title, loc="left", color=_INK, fontsize=12)
    panel.patch.set_visible(False)
    panel.spines[:].set_visible(False)
    panel.margins(x=0.01)
    panel.grid(axis="y", color=_RULE, linewidth=0.8)
    panel.tick_params(colors=FAINT, length=0, labelsize=11)
    marks = [[(step, 0), (step, 1)] for step in dict.fromkeys(restarts)]
    if marks:  # one collection: as lines of their own, those of 300 attempts took a second
        dashed = LineCollection(marks, colors=MARK, linewidths=1, linestyles=[(0, (3, 3))])
        dashed.set_transform(panel.get_xaxis_transform())
        panel.add_collection(dashed, autolim=False)
        panel.update_datalim([mark[0] for mark in marks], updatey=False)


def drawn_svg(figure: Figure, canvas: Canvas, description: str) -> str:
    """The figure as one `<svg>` element, in the colours of the page."""
    data = io.StringIO()
    with _SETTINGS, mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": canvas.name}):
        figure.savefig(data, format="svg", metadata=_NO_METADATA, transparent=True)
    text = data.getvalue()
    text = text[text.index("<svg") :]  # what precedes it, and name spaces, belong only to a separate file
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # a page may hold several charts, but each id only once
    text = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)
    return text.replace("<svg", f'<svg class="{canvas.name}" role="img" aria-label="{description}"', 1)
