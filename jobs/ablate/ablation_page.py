"""The page of an ablation: its table, what the source says, plots, and the recipes."""

from __future__ import annotations

from html import escape

from jobs.ablate.table import (
    NOTE,
    PAPER_NOTE,
    Results,
    columns,
    measures,
    rows,
    seeded,
    statement_columns,
    statement_rows,
)
from jobs.report.page import page, pairs, paragraph, section, table
from jobs.report.series_charts import Curve, Dot, curves_chart, dots_chart


def ablation_html(results: Results) -> str:
    """The page as HTML; all outside text is escaped."""
    runs = [run for variant in results["variants"] for run in variant["runs"]]
    finished = sum(run["state"] == "finished" for run in runs)
    sources = [(one["variant"], one["measure"], f"{one['value']:.1f}", one["source"]) for one in results["paper"]]
    paper = paragraph(PAPER_NOTE) + table(("variant", "measure", "%", "source"), sources) if sources else ""
    statements = table(statement_columns(), statement_rows(results)) if results["statements"] else ""
    sections = [
        section("Table", table(columns(results), rows(results)) + paragraph(NOTE)),
        section("What the source says", statements),
        section("Figures of others", paper),
        *(section(name, _dots(results, name)) for name in measures(results)),
        section("Loss", _losses(results)),
        section("Variants", pairs((one["name"], one["changes"] or one["base"]) for one in results["variants"])),
        section("Evaluation", pairs(results["evaluation"].items())),
        section("Runs", table(("run", "state", "step", "URL"), _run_rows(runs))),
    ]
    return page(
        title=f"{results['name']} · ConvMAE ablation",
        header=f"<p>ConvMAE ablation · {escape(results['name'])}</p>\n<h1>{escape(results['title'])}</h1>",
        facts=[
            ("Variants", f"{len(results['variants'])}"),
            ("Seeds", f"{len(results['seeds'])}"),
            ("Finished runs", f"{finished} of {len(runs)}"),
        ],
        sections=sections,
    )


def _dots(results: Results, measure: str) -> str:
    dots = [
        Dot(
            variant["name"],
            list(seeded(variant, "accuracies", measure).values()),
            list(seeded(variant, "random", measure).values()),
        )
        for variant in results["variants"]
    ]
    note = "Each seed, its range and the mean (a diamond); crosses are random weights."
    return dots_chart(dots, title=f"top-1, %, by {measure}") + paragraph(note)


def _losses(results: Results) -> str:
    curves = []
    for variant in results["variants"]:
        drawn = [run for run in variant["runs"] if run.get("losses")]
        if drawn:
            run = drawn[0]
            curves.append(Curve(f"{variant['name']}, seed {run['seed']}", run["epochs"], run["losses"]))
    note = "The first seed of each variant. Losses of different targets or masks do not compare."
    return curves_chart(curves, title="loss", axis="epoch") + (paragraph(note) if curves else "")


def _run_rows(runs: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return [(run["run"], run["state"], run.get("step", 0), run["url"]) for run in runs]
