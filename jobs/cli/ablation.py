"""Commands on several runs: ablations and comparisons."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.completion import run_names
from jobs.cli.elsewhere import at_cluster, at_run
from jobs.cli.shared import AsJson, RunName, RunRoot, existing_run, open_session
from jobs.errors import RunFailedError
from jobs.terminal import print_json, print_table, say
from pipeline.access.places import normal
from pipeline.errors import UserError

app = typer.Typer()


@app.command(cls=at_cluster())
def ablate(
    spec: Annotated[
        str, typer.Argument(metavar="SPEC", help="Name of a shipped spec, or a .toml file.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FIELD=VALUE]...",
            help="Fields of all recipes (data=URL), of the evaluation (evaluation.data=URL), or seeds=[0, 1].",
        ),
    ] = None,
    *,
    at_most: Annotated[int, typer.Option(min=0, help="Most runs at once; 0: as many as the cluster has room for.")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Print the runs and what they cost, and start nothing.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Write and print the table of what there is now.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop the runs that are at work; each saves first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train, evaluate and compare variants of a recipe over several seeds.

    The runs are ordinary ones, which `list`, `stop` and `resume` know. The same command resumes where it was cut off:
    finished runs are kept, those at work are followed, others are resumed. Ctrl-C leaves the runs at work.
    """
    from jobs.ablate.command import opened, show_plan, stop_and_say, train_and_say, write_and_say

    session, words = open_session(), list(overrides or ())
    if plan:
        show_plan(session.storage, spec, words, as_json=as_json)
        return
    ablation = opened(session, spec, words)
    session.storage.check(ablation.root, write=False)
    session.remember_run_root(ablation.root)
    if stop:
        stop_and_say(ablation)
    elif table:
        write_and_say(ablation, as_json=as_json)
    else:
        train_and_say(ablation, at_most=at_most, as_json=as_json)


@app.command(cls=at_run("page"))
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN...", help="Names of runs, or their paths or URLs.", autocompletion=run_names),
    ],
    page: Annotated[str, typer.Option(help="HTML page to write, with their curves on one axis.")] = "",
    run_root: RunRoot = "",
    as_json: AsJson = False,
) -> None:
    """Compare what runs came to: what differs in their recipes, losses at the same epochs, accuracies, cost.

    For runs that are meant to differ. `diff` says whether two are the same, to the bit, and if not, since which step.
    """
    from jobs.recipe.differences import differing_fields
    from jobs.report import comparison

    if len(runs) < 2:
        raise UserError("RUN", "must be at least two", " ".join(runs), "name another run")
    if page and not page.endswith(".html"):
        raise UserError("--page", "must end in .html", page, "write it like comparison.html")
    session = open_session()
    found = [comparison.ComparedRun.read(existing_run(session, run, run_root)) for run in runs]
    if page:
        session.storage.write(normal(page), comparison.comparison_html(found).encode())
    if as_json:
        print_json(comparison.comparison_json(found))
        return
    print_table(comparison.FIGURE_COLUMNS, comparison.figure_rows(found))
    columns, rows = comparison.loss_rows(found)
    print_table(columns, rows)
    fields = differing_fields([run.recipe for run in found])
    print_table(
        ("field", *comparison.named_apart(found)), [(name, *map(str, values)) for name, values in fields.items()]
    )
    if not fields:
        say("their recipes are the same")
    if kept := comparison.accuracy_rows(found):
        print_table(comparison.ACCURACY_COLUMNS, kept)
    else:
        say(comparison.NO_ACCURACY)
    if page:
        say(normal(page))


@app.command(cls=at_run())
def diff(run: RunName, other: RunName, run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """Show in what two runs differ, exactly: recipes, software, data, attempts, and the first step that differs.

    Samples, learning rates, losses and digests of all weights are compared step by step, of a step that was done again
    the last time. Exit code 1 where these differ. `compare` shows what several runs came to.
    """
    from jobs.report.run_difference import RunDifference

    session = open_session()
    found = RunDifference.between(existing_run(session, run, run_root), existing_run(session, other, run_root))
    if as_json:
        print_json(found.to_json())
    else:
        names = found.names()
        print_table(("", *names), found.state_rows())
        print_table(("field", *names, "decides"), fields := found.field_rows())
        print_table(("origin", *names), found.origin_rows())
        if not fields:
            say("recipe: the same")
        if note := found.origin_note():
            say(note)
        for line in found.history.lines():
            say(line)
    if found.history.first_step is not None:
        raise RunFailedError(f"step {found.history.first_step} is the first that differs")
