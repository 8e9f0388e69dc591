"""Comparison of runs: what differs in their recipes, their curves on one axis, their accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.recipe.differences import differing_fields
from jobs.recipe.recipe import Recipe
from jobs.report.curves import CHARTED, accuracy_curve
from jobs.report.page import page, paragraph, section, table
from jobs.report.run_figures import RunFigures
from jobs.run.accuracy_rows import AccuracyCurve
from jobs.run.directory import RunDirectory
from jobs.run.evaluations import accuracies, list_evaluations
from jobs.run.validation_rows import VALIDATION_COLUMNS
from jobs.terminal import figure

if TYPE_CHECKING:  # it imports matplotlib, which a comparison on a terminal does not need
    from jobs.report.series_charts import Curve

MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of the longest run's epochs at which losses are listed."""
NO_ACCURACY = (
    "no accuracy is known of these runs: none was measured while they trained; `convmae evaluate RUN` prints one"
)


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs."""

    name: str
    url: str
    recipe: Recipe
    figures: RunFigures
    evaluations: Sequence[Mapping[str, Any]]
    """That are kept with it, as `convmae evaluate --json` writes them."""
    accuracies: AccuracyCurve
    """As they were measured while it trained: by probes, or on a fine-tuning's validation samples."""
    steps_per_epoch: int
    """0: not known."""

    @classmethod
    def read(cls, run: RunDirectory) -> ComparedRun:
        """Read its directory.

        Raises:
            RunError: There is no such run, or it is damaged.
        """
        recipe, heartbeat = run.read_recipe(), run.read_heartbeat()
        steps = run.read_latest_steps({*CHARTED, *VALIDATION_COLUMNS})
        return cls(
            run.name,
            run.url,
            recipe,
            RunFigures.of(recipe, heartbeat, steps),
            list_evaluations(run.storage, run.url),
            accuracy_curve(recipe, run.read_events(), steps),
            heartbeat.get("steps_per_epoch") or 0,
        )

    @property
    def accuracy_epochs(self) -> list[float]:
        """Where its accuracies were measured, as the places of its losses are given."""
        return [row.step / (self.steps_per_epoch or 1) for row in self.accuracies.rows]


def named_apart(runs: Sequence[ComparedRun]) -> list[str]:
    """The names of the runs; URLs where two have the same."""
    names = [run.name for run in runs]
    return [run.url if names.count(run.name) > 1 else run.name for run in runs]


def accuracy_rows(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    """Run, step, method, accuracy and data: of the newest one measured while it trained, then of each evaluation."""
    newest: list[tuple[str, ...]] = [
        (name, f"{row.step}", text, f"{100 * row.accuracies[key]:.1f} %", f"{row.tested:,} samples, while it trained")
        for name, run in zip(named_apart(runs), runs, strict=True)
        for row in run.accuracies.rows[-1:]
        for key, text in run.accuracies.shown.items()
    ]
    return newest + [
        (name, str(report["weights"].get("step", "-")), method, f"{value:.1f} %", _data(report))
        for name, run in zip(named_apart(runs), runs, strict=True)
        for report in run.evaluations
        for method, value in accuracies(report).items()
    ]


ACCURACY_COLUMNS = ("run", "step", "method", "accuracy", "tested on")


def accuracy_curves(runs: Sequence[ComparedRun]) -> dict[str, list[Curve]]:
    """The accuracies over epochs of the runs that have them, by what was measured."""
    from jobs.report.series_charts import Curve

    found: dict[str, list[Curve]] = {}
    for name, run in zip(named_apart(runs), runs, strict=True):
        for key, text in run.accuracies.shown.items() if run.accuracies.rows else ():
            values = [row.accuracies[key] for row in run.accuracies.rows]
            found.setdefault(text, []).append(Curve(name, run.accuracy_epochs, values))
    return found


def _data(report: Mapping[str, Any]) -> str:
    return f"{report['test']['samples']:,} of {report['test']['url']}, learned from {report['train']['samples']:,}"


FIGURE_COLUMNS = ("run", "state", "step", "epochs", "final loss", "hours", "unit")


def figure_rows(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    """How far each came, and what it cost."""
    return [
        (
            name,
            run.figures.state,
            f"{run.figures.step:,}/{run.figures.total_steps:,}",
            f"{run.recipe.epochs:,}",
            figure(run.figures.final_loss, ".4f"),
            figure(run.figures.cost.whole, ".2f"),
            run.figures.cost.unit,
        )
        for name, run in zip(named_apart(runs), runs, strict=True)
    ]


def loss_rows(runs: Sequence[ComparedRun]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the loss of each run at the same epochs, `-` where it did not train."""
    last = max((run.figures.epochs[-1] for run in runs if run.figures.epochs), default=0.0)
    marks = [share * last for share in MARKS]
    columns = ["loss at epoch", *(f"{mark:.3g}" for mark in marks)]
    rows = [[name, *(_loss_at(run, mark) for mark in marks)] for name, run in zip(named_apart(runs), runs, strict=True)]
    return columns, rows


def _loss_at(run: ComparedRun, epoch: float) -> str:
    epochs = run.figures.epochs
    if not epochs or not epochs[0] <= epoch <= epochs[-1] * (1 + 1e-9):
        return "-"
    return f"{np.interp(epoch, epochs, run.figures.losses):.4f}"


def comparison_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """All that is compared, as plain values."""
    return {
        "differences": differing_fields([run.recipe for run in runs]),
        "runs": [
            {
                "run": run.name,
                "url": run.url,
                "state": run.figures.state,
                "step": run.figures.step,
                "total_steps": run.figures.total_steps,
                "final_loss": run.figures.final_loss,
                "cost": vars(run.figures.cost),
                "curve": {"epochs": run.figures.epochs, "losses": run.figures.losses},
                "measured": _measured_json(run) if run.accuracies.rows else {},
                "accuracies": [
                    {"step": report["weights"].get("step"), "test": report["test"], "top1": accuracies(report)}
                    for report in run.evaluations
                ],
            }
            for run in runs
        ],
    }


def _measured_json(run: ComparedRun) -> dict[str, Sequence[float]]:
    rows, found = run.accuracies.rows, {"epochs": run.accuracy_epochs}
    found |= {name: [row.accuracies[name] for row in rows] for name in run.accuracies.shown}
    return {"steps": [row.step for row in rows], **found}


def comparison_html(runs: Sequence[ComparedRun]) -> str:
    """The page as HTML; all outside text is escaped."""
    from jobs.report.series_charts import Curve, curves_chart

    names = named_apart(runs)
    fields = [(name, *map(str, values)) for name, values in differing_fields([run.recipe for run in runs]).items()]
    differences = table(("field", *names), fields) if fields else paragraph("Their recipes are the same.")
    curves = [Curve(name, run.figures.epochs, run.figures.losses) for name, run in zip(names, runs, strict=True)]
    chart = curves_chart(curves, title="loss", axis="epoch") or paragraph("No step was recorded yet.")
    kept, drawn = accuracy_rows(runs), accuracy_curves(runs)
    accuracy = "".join(curves_chart(each, title=f"accuracy, {what}", axis="epoch") for what, each in drawn.items())
    note = "Losses of different targets, masks or data do not compare."
    return page(
        title=f"{' · '.join(names)} · ConvMAE comparison",
        header=f"<p>ConvMAE comparison</p>\n<h1>{len(runs)} runs</h1>",
        facts=(),
        sections=[
            section("Runs", table(FIGURE_COLUMNS, figure_rows(runs))),
            section("Accuracies", accuracy + table(ACCURACY_COLUMNS, kept) if kept else paragraph(NO_ACCURACY)),
            section("Loss", chart + table(*loss_rows(runs)) + paragraph(note)),
            section("Differences of their recipes", differences),
        ],
    )
