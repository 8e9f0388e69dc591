"""The table of an ablation, of its results alone: for terminals, Markdown and spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.ablate.statistics import Spread, difference

Results = Mapping[str, Any]
NOTE = (
    "Top-1 in percent, mean ± standard deviation over seeds (n - 1). `random`: weights of the same model and seed that "
    "nothing has trained. `gain`: its mean and 95 % interval (Student), of differences of the same seed."
)
PAPER_NOTE = "Columns of others are figures that they published, of their own evaluation: compare their differences."


def measures(results: Results) -> list[str]:
    """Names of our own, in order."""
    return list(dict.fromkeys(name for run in _runs(results) for name in run.get("accuracies", {})))


def paper_measures(results: Results) -> list[str]:
    """Names of those that others have published, in order."""
    return list(dict.fromkeys(figure["measure"] for figure in results["paper"]))


def columns(results: Results) -> list[str]:
    """Names of the table's columns."""
    ours = [text for name in measures(results) for text in (name, "random", "gain")]
    return [
        "variant",
        "seeds",
        "loss",
        *ours,
        *map(_paper_name, paper_measures(results)),
        _unit(results),
        "of them lost",
    ]


def rows(results: Results) -> list[list[str]]:
    """A row for each variant; `-` is what is not known."""
    return [_row(results, variant) for variant in results["variants"]]


def _row(results: Results, variant: Mapping[str, Any]) -> list[str]:
    runs = variant["runs"]
    finished = [run for run in runs if run["state"] == "finished"]
    cells = [variant["name"], f"{len(finished)}/{len(runs)}"]
    cells.append(_spread_text([run["final_loss"] for run in finished if run["final_loss"] is not None], ".4f"))
    for name in measures(results):
        own, random = seeded(variant, "accuracies", name), seeded(variant, "random", name)
        cells += [_spread_text(list(own.values())), _spread_text(list(random.values())), _gain(random, own)]
    for measure in paper_measures(results):
        found = [one for one in results["paper"] if (one["variant"], one["measure"]) == (variant["name"], measure)]
        cells.append(f"{found[0]['value']:.1f}" if found else "-")
    return [*cells, *_cost(runs)]


def seeded(variant: Mapping[str, Any], kind: str, measure: str) -> dict[int, float]:
    """A figure of each seed.

    Args:
        variant: Of the results.
        kind: `accuracies`, or `random` for those of random weights.
        measure: Its name.
    """
    return {run["seed"]: run[kind][measure] for run in variant["runs"] if measure in run.get(kind, {})}


def _gain(random: Mapping[int, float], own: Mapping[int, float]) -> str:
    gain = difference(random, own)
    if gain is None:
        return "-"
    half = gain.half_interval
    return f"{gain.mean:+.1f}" + ("" if half is None else f" ± {half:.1f}")


def _cost(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Hours of all runs together, and those that no step which counts was made in."""
    costs = [run["cost"] for run in runs if "cost" in run]
    if not costs or any(cost["whole"] is None for cost in costs):
        return "-", "-"
    whole = sum(cost["whole"] for cost in costs)
    return f"{whole:.2f}", f"{max(0.0, whole - sum(cost['productive'] for cost in costs)):.2f}"


def narrow_tables(results: Results) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The same for terminals, in tables of few columns: one for each measure, then loss, hours and others' figures."""
    head, body = columns(results), rows(results)
    first = head.index("loss") + 1
    groups = [list(range(start, start + 3)) for start in range(first, first + 3 * len(measures(results)), 3)]
    shown = {0, 1, *(place for group in groups for place in group)}
    groups.append([place for place in range(len(head)) if place not in shown])
    for group in groups:
        yield [head[place] for place in (0, 1, *group)], [[row[place] for place in (0, 1, *group)] for row in body]


def statement_lines(results: Results) -> Iterator[str]:
    """What others found, and whether ours agrees, for terminals."""
    for one in results["statements"]:
        measure = f" by {one['measure']}" if one["measure"] else ""
        yield f"{one['verdict']}{measure}: {one['text']} ({one['source']}); ours: {one['figures']}"


def statement_columns() -> tuple[str, ...]:
    """Of the table of statements."""
    return "statement", "source", "ours, by", "ours", "verdict"


def statement_rows(results: Results) -> list[list[str]]:
    """What others found, beside what was measured."""
    return [
        [one["text"], one["source"], one["measure"] or "-", one["figures"], one["verdict"]]
        for one in results["statements"]
    ]


def markdown(results: Results) -> str:
    """The tables as Markdown."""
    parts = [f"# {results['title']}", "", *_markdown_table(columns(results), rows(results)), "", NOTE, ""]
    if results["paper"]:
        sources = [[one["variant"], one["measure"], f"{one['value']:.1f}", one["source"]] for one in results["paper"]]
        parts += [PAPER_NOTE, "", *_markdown_table(("variant", "measure", "%", "source"), sources), ""]
    if results["statements"]:
        parts += ["## What the source says", "", *_markdown_table(statement_columns(), statement_rows(results)), ""]
    return "\n".join(parts)


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *body):
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def csv_text(results: Results) -> str:
    """One line for each run, with figures as numbers."""
    names = measures(results)
    head = ["variant", "seed", "run", "state", "step", "final_loss", "unit", "productive", "whole"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, *names, *(f"random: {name}" for name in names)])
    for variant in results["variants"]:
        for run in variant["runs"]:
            cost = run.get("cost", {})
            figures = [*(run.get("accuracies", {}).get(name, "") for name in names)]
            figures += [run.get("random", {}).get(name, "") for name in names]
            known = [variant["name"], run["seed"], run["run"], run["state"], run.get("step", 0)]
            known += [
                run.get("final_loss", ""),
                cost.get("unit", ""),
                cost.get("productive", ""),
                cost.get("whole", ""),
            ]
            writer.writerow(["" if cell is None else cell for cell in [*known, *figures]])
    return out.getvalue()


def _spread_text(values: Sequence[float], form: str = ".1f") -> str:
    spread = Spread.of(values)
    return "-" if spread is None else spread.text(form)


def _paper_name(measure: str) -> str:
    return f"paper: {measure}"


def _unit(results: Results) -> str:
    units = dict.fromkeys(run["cost"]["unit"] for run in _runs(results) if "cost" in run)
    return ", ".join(units) or "hours"


def _runs(results: Results) -> Iterator[Mapping[str, Any]]:
    for variant in results["variants"]:
        yield from variant["runs"]
