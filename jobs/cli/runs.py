"""Commands on runs: start, resume, watch and stop them, and read what they recorded."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Annotated

import typer

from jobs.cli.completion import run_names
from jobs.cli.elsewhere import at_cluster, at_run, at_store
from jobs.cli.shared import (
    AsJson,
    Overrides,
    RecipeName,
    RunName,
    RunRoot,
    amended,
    amended_recipe,
    existing_run,
    open_session,
)
from jobs.errors import RunError, RunFailedError
from jobs.terminal import print_json, print_pairs, print_table, say, shown, whole_lines
from pipeline.access.places import normal
from pipeline.errors import UserError

app = typer.Typer()

EVENTS_SHOWN = 10
"""Newest events below a status."""
SET_SECONDS = 30.0
"""For a live run to hear of changed fields."""

TraceOption = Annotated[
    str, typer.Option("--trace", help="URL at which to record the samples, crops and masks of each step and rank.")
]
RunOption = Annotated[
    str, typer.Option("--run", help="Name of the run; default: the recipe's. The same name resumes that run.")
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Do not skip a damaged checkpoint when resuming: on_damaged_checkpoint=fail."),
]


@app.command(cls=at_cluster("trace"))
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    run: RunOption = "",
    trace: TraceOption = "",
    supervised: Annotated[
        bool,
        typer.Option("--supervised", help="Restart the driver if it is killed, as a submitted job does; for a RayJob."),
    ] = False,
    strict: Strict = False,
) -> None:
    """Train in the foreground, on the cluster that RAY_ADDRESS names or on the local stack.

    Ctrl-C or SIGTERM saves a checkpoint and stops. The same command resumes the run.
    """
    from jobs.control.run_plan import plan_run
    from jobs.control.workflow import train_here, train_supervised
    from jobs.remote.frames import CALLER_VARIABLE

    session, resolved = open_session(), amended_recipe(recipe, overrides, strict=strict)
    name = run or resolved.name
    if supervised and CALLER_VARIABLE in session.environ:
        remedy = "use `convmae submit`, whose job is supervised"
        raise UserError("--supervised", "must be given on a node of the cluster", "a command from elsewhere", remedy)
    if supervised:
        train_supervised(session, plan_run(session, resolved, name, trace, drives=False, is_patient=True))
    else:
        train_here(session, plan_run(session, resolved, name, trace))


@app.command(hidden=True)
def drive(run_url: str, trace: TraceOption = "") -> None:
    """Drive the run whose directory is RUN_URL; what a submitted job runs."""
    from jobs.control.run_plan import plan_run
    from jobs.control.unreported_end import end_noted
    from jobs.control.workflow import train_here

    session = open_session(verbose=True)  # the job's log is the only log of the ranks that a user has
    directory = session.run(run_url)
    with end_noted(directory, session.environ):
        recipe = directory.read_recipe().amended({"run_root": directory.root})
        train_here(session, plan_run(session, recipe, directory.name, trace, is_patient=True))


@app.command(cls=at_run("trace"))
def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    run: RunOption = "",
    trace: TraceOption = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show progress until the run ends.")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Train as a Ray job, which continues when this terminal is closed. The same command resumes the run."""
    from jobs.control.run_plan import plan_run
    from jobs.control.workflow import train_as_job

    session, resolved = open_session(), amended_recipe(recipe, overrides, strict=strict)
    plan = plan_run(session, resolved, run or resolved.name, trace, drives=False)
    train_as_job(session, plan, follow=follow, as_json=as_json)


@app.command(cls=at_run("trace"))
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    weights: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="WHAT",
            help="Pretrained weights: a run, RUN@STEP, a consolidated .safetensors file, an official .pth file, or "
            "`random`; default: init_from.",
            show_default=False,
            autocompletion=run_names,
        ),
    ] = "",
    run: RunOption = "",
    trace: TraceOption = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show progress until the run ends.")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Train a classifier from pretrained weights, as a Ray job: a run like any other. The same command resumes it.

    RECIPE is one of a fine-tuning or of linear probing: convmae_base_finetune, convmae_base_linear, tiny_finetune ...
    """
    from jobs.control.run_plan import plan_run
    from jobs.control.workflow import train_as_job
    from jobs.weights.named_weights import check_is_finetuning, resolved_weights

    session, resolved = open_session(), amended_recipe(recipe, overrides, strict=strict)
    check_is_finetuning(resolved)
    resolved = resolved.amended(
        resolved_weights(
            session.storage, resolved, weights, lambda name: existing_run(session, name, resolved.run_root)
        )
    )
    plan = plan_run(session, resolved, run or resolved.name, trace, drives=False)
    train_as_job(session, plan, follow=follow, as_json=as_json)


@app.command(cls=at_run())
def resume(
    run: RunName,
    overrides: Overrides = None,
    *,
    run_root: RunRoot = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show progress until the run ends.")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Resume a run that was stopped or interrupted, as a Ray job, by the recipe in its directory.

    FIELD=VALUE may change where and how the run executes (max_workers=8), not what it computes.
    """
    from jobs.control.run_plan import plan_run
    from jobs.control.workflow import train_as_job

    session = open_session()
    directory = existing_run(session, run, run_root)
    recipe = amended(directory.read_recipe(), overrides, strict=strict)
    recipe = recipe.amended({"run_root": directory.root})
    plan = plan_run(session, recipe, directory.name, drives=False)
    train_as_job(session, plan, follow=follow, as_json=as_json)


@app.command(name="list", cls=at_run())
def list_command(run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """List the runs, with the state of each."""
    from jobs.report.status import list_cells, statuses
    from jobs.run.directory import list_runs

    session = open_session()
    root = session.run_root(run_root)
    session.storage.check(root, write=False)
    session.remember_run_root(root)
    rows = statuses(list_runs(session.storage, root))
    if as_json:
        print_json(rows)
        return
    say(f"{len(rows)} runs under {root}")
    print_table(("run", "state", "step", "loss", "images/s", "workers"), [list_cells(row) for row in rows])
    for row in rows:
        if "error" in row:
            say(f"{row['run']}: {row['error']}")


@app.command(cls=at_run())
def status(
    run: RunName,
    run_root: RunRoot = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it until the run ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the state of a run, and its events.

    With --watch and --json, print one JSON object per line.
    """
    from jobs.report.status import event_line, page_address, run_status, status_lines
    from jobs.report.watch import status_display, watch_run

    directory = existing_run(open_session(), run, run_root)
    if watch:
        with status_display(as_json=as_json) as show, contextlib.suppress(KeyboardInterrupt):
            watch_run(directory, show)
        return
    current = run_status(directory)
    if address := page_address(directory, current):
        current["page_url"] = address
    if as_json:
        print_json({**current, "events": directory.read_events()})
        return
    print_pairs(status_lines(current))
    for event in directory.read_newest_events(EVENTS_SHOWN):
        say(event_line(event))


@app.command(cls=at_run())
def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
    run_root: RunRoot = "",
    as_json: AsJson = False,
) -> None:
    """Print the log of a submitted run's newest job; with --verbose, including lines of Ray itself.

    With --json, each line is an object: the job, and a line of its log.
    """
    from jobs.cluster import submission
    from jobs.cluster.log_filter import own_lines

    session = open_session()
    directory = existing_run(session, run, run_root)
    job = submission.newest_job(session, directory)
    lines = whole_lines(submission.log_pieces(session, directory, job, follow=follow))
    for line in lines if session.is_verbose else own_lines(lines):
        sys.stdout.write(shown(json.dumps({"job": job, "line": line}) if as_json else line, sys.stdout) + "\n")
        sys.stdout.flush()


@app.command(cls=at_run())
def stop(run: RunName, run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """Ask a run to save a checkpoint and end; returns when it has ended."""
    from jobs.control.lease import is_live
    from jobs.control.workflow import outcome
    from jobs.run.directory import FINAL_STATES

    directory = existing_run(open_session(), run, run_root)
    if not is_live(directory):
        state = directory.read_heartbeat().get("state", "submitted")
        raise RunError(
            "run", "must be running to be stopped", f"{directory.name} ({state})", "there is nothing to stop"
        )
    directory.write_stop_request()
    if not as_json:
        say(f"asked {directory.name} to save and stop")
    while (heartbeat := directory.read_heartbeat())["state"] not in FINAL_STATES:
        time.sleep(1.0)
    if as_json:
        print_json({"run": directory.name, "url": directory.url, **outcome(heartbeat)})
        return
    say(f"{directory.name}: {heartbeat['state']} at step {heartbeat['step']}; `convmae resume {run}` resumes it")


@app.command("set", cls=at_run())
def set_fields(
    run: RunName,
    changes: Annotated[list[str], typer.Argument(metavar="FIELD=VALUE...", help="Fields to change: max_workers=8")],
    run_root: RunRoot = "",
    as_json: AsJson = False,
) -> None:
    """Change how a live run executes: workers, checkpoints, threads, what to do about faults; no step is lost.

    The ranks save, and the next attempt begins with the changed fields, which stay when the run is resumed. What the
    run computes never changes; what belongs to its driver needs `convmae stop` and `convmae resume RUN FIELD=VALUE`.
    """
    from jobs.control.changed_recipe import changed_live
    from jobs.control.lease import is_live

    directory = existing_run(open_session(), run, run_root)
    if not is_live(directory):
        state = directory.read_heartbeat().get("state", "submitted")
        remedy = f"`convmae resume {run} {' '.join(changes)}` resumes it with these"
        raise RunError("run", "must be running to be changed", f"{directory.name} ({state})", remedy)
    found = changed_live(directory, changes, run)
    if found:
        directory.write_set_request(found)
        deadline = time.monotonic() + SET_SECONDS
        while directory.is_set_requested() and time.monotonic() < deadline:
            time.sleep(0.2)
    heard = not directory.is_set_requested()
    if as_json:
        values = {name: {"before": before, "after": after} for name, (before, after) in found.items()}
        print_json({"run": directory.name, "url": directory.url, "changes": values, "heard": heard})
        return
    for name, (before, after) in found.items():
        say(f"{name}: {before} -> {after}")
    if not found:
        say(f"{directory.name} has these values already")
    elif heard:
        say("in force from the next attempt, which begins as soon as the ranks have saved")
    else:
        say(f"the run has not answered for {SET_SECONDS:.0f} s; it obeys when it does")


@app.command(cls=at_run())
def profile(
    run: RunName,
    *,
    rank: Annotated[int, typer.Option("--rank", help="Which one to profile.")] = 0,
    steps: Annotated[int, typer.Option("--steps", help="For how many steps.")] = 5,
    run_root: RunRoot = "",
    as_json: AsJson = False,
) -> None:
    """Profile some steps of one rank of a run that trains: operators, a Chrome trace, and a flame graph with py-spy.

    Nothing is restarted. Prints where the files are once they are written, in the run directory.
    """
    from jobs.control.profiling import profiled

    event = profiled(existing_run(open_session(), run, run_root), rank, steps)
    if as_json:
        print_json(event)
        return
    for name in event["files"]:
        say(f"{event['url']}/{name}")
    if event["reason"]:
        say(event["reason"])


@app.command(cls=at_run())
def history(run: RunName, run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """Print one line per step: step, epoch, loss, learning rate, world size, attempt, and MFU where it is known.

    Some lines end with a digest of all weights and moments: equal runs have equal ones, at any world size; some with
    the accuracy of the encoder, by kNN and a linear probe, or that of a fine-tuning on its validation samples.
    """
    from jobs.report.history_lines import history_blocks

    for block in history_blocks(existing_run(open_session(), run, run_root), as_json=as_json):
        sys.stdout.write(shown(block, sys.stdout))


@app.command(cls=at_store("url", "other"))
def trace(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL that was given to `--trace`.")],
    other: Annotated[
        str, typer.Argument(metavar="[OTHER]", help="Another one, to compare with.", show_default=False)
    ] = "",
) -> None:
    """Print what each rank consumed, one JSON object for each step and rank; or compare two traces.

    With OTHER: one line for each step in which samples, crops, flips, masks or learning rates differ, whatever the
    world sizes; exit code 1 if any differ.
    """
    from jobs.run.trace import differences, read_trace

    storage = open_session().storage
    url, other = normal(url), other and normal(other)
    if not other:
        for row in read_trace(storage, url):
            sys.stdout.write(json.dumps(row) + "\n")
        return
    found = list(differences(read_trace(storage, url), read_trace(storage, other)))
    for line in found:
        say(line)
    if found:
        raise RunFailedError(f"{len(found)} differences between {url} and {other}")
    say("the traces agree")


@app.command(cls=at_run())
def quarantine(run: RunName, run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """Print one line for each sample that the run could not use: where it lies, the fault, and its substitute."""
    for row in existing_run(open_session(), run, run_root).read_quarantine():
        if as_json:
            sys.stdout.write(json.dumps(row) + "\n")
        else:
            line = f"step {row['step']:>8}  sample {row['id']}  {row['fault']}  {row['url']}: {row['reason']}"
            say(f"{line}; substitute: sample {row['substitute']}")


@app.command(cls=at_run())
def report(run: RunName, run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """Write the run's report.html, with a picture of reconstructions from its newest checkpoint."""
    from jobs.control.finish import write_run_report

    url = write_run_report(existing_run(open_session(), run, run_root))
    if as_json:
        print_json({"run": run, "report": url})
    else:
        say(url)
