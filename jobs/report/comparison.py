"""Comparison of runs: what differs in their recipes, their curves on one axis, their accuracies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.recipe.recipe import Recipe
from jobs.report.page import page, paragraph, section, table
from jobs.report.run_figures import RunFigures
from jobs.report.series_charts import Curve, curves_chart
from jobs.run.directory import RunDirectory
from jobs.run.evaluations import accuracies, list_evaluations
from jobs.terminal import figure

MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of the longest run's epochs at which losses are listed."""
NO_ACCURACY = "no accuracy is kept with these runs: `convmae ablate` keeps them, `convmae evaluate RUN` prints them"


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs."""

    name: str
    url: str
    recipe: Recipe
    figures: RunFigures
    evaluations: Sequence[Mapping[str, Any]]
    """That are kept with it, as `convmae evaluate --json` writes them."""

    @classmethod
    def read(cls, run: RunDirectory) -> ComparedRun:
        """Read its directory.

        Raises:
            RunError: There is no such run, or it is damaged.
        """
        recipe = run.read_recipe()
        return cls(run.name, run.url, recipe, RunFigures.read(run, recipe), list_evaluations(run.storage, run.url))


def named_apart(runs: Sequence[ComparedRun]) -> list[str]:
    """The names of the runs; URLs where two have the same."""
    names = [run.name for run in runs]
    return [run.url if names.count(run.name) > 1 else run.name for run in runs]


def differing_fields(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """The values of every field of the recipe in which runs differ."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    fields = {name: [values.get(name) for values in flat] for name in flat[0]}
    return {name: values for name, values in fields.items() if any(value != values[0] for value in values)}


def _flat(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for name, value in recipe.to_json().items():
        if name == "model":
            yield from ((f"model.{key}", item) for key, item in value.items())
        else:
            yield name, value


def accuracy_rows(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    """Run, step, method, top-1 and the data of each evaluation."""
    return [
        (name, str(report["weights"].get("step", "-")), method, f"{value:.1f} %", _data(report))
        for name, run in zip(named_apart(runs), runs, strict=True)
        for report in run.evaluations
        for method, value in accuracies(report).items()
    ]


ACCURACY_COLUMNS = ("run", "step", "method", "top-1", "tested on")


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
        "differences": differing_fields(runs),
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
                "accuracies": [
                    {"step": report["weights"].get("step"), "test": report["test"], "top1": accuracies(report)}
                    for report in run.evaluations
                ],
            }
            for run in runs
        ],
    }


def comparison_html(runs: Sequence[ComparedRun]) -> str:
    """The page as HTML; all outside text is escaped."""
    names = named_apart(runs)
    fields = [(name, *map(str, values)) for name, values in differing_fields(runs).items()]
    differences = table(("field", *names), fields) if fields else paragraph("Their recipes are the same.")
    curves = [Curve(name, run.figures.epochs, run.figures.losses) for name, run in zip(names, runs, strict=True)]
    chart = curves_chart(curves, title="loss", axis="epoch") or paragraph("No step was recorded yet.")
    kept = accuracy_rows(runs)
    note = "Losses of different targets, masks or data do not compare."
    return page(
        title=f"{' · '.join(names)} · ConvMAE comparison",
        header=f"<p>ConvMAE comparison</p>\n<h1>{len(runs)} runs</h1>",
        facts=(),
        sections=[
            section("Runs", table(FIGURE_COLUMNS, figure_rows(runs))),
            section("Accuracies", table(ACCURACY_COLUMNS, kept) if kept else paragraph(NO_ACCURACY)),
            section("Loss", chart + table(*loss_rows(runs)) + paragraph(note)),
            section("Differences of their recipes", differences),
        ],
    )
