"""Runs: planned, begun, watched, stopped."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Annotated

import typer

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
from jobs.terminal import figure, print_json, print_pairs, print_table, say, shown, whole_lines
from pipeline.access.places import normal
from pipeline.errors import UserError

app = typer.Typer()

TraceOption = Annotated[
    str, typer.Option("--trace", help="URL at which to note the samples, crops and masks of each step and rank.")
]
RunOption = Annotated[
    str, typer.Option("--run", help="Name of the run; default: the recipe's. The same name resumes it.")
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Refuse to resume past a damaged checkpoint: on_damaged_checkpoint=fail."),
]


@app.command(cls=at_store())
def simulate(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the run is given.")],
    mtbf_hours: Annotated[float, typer.Option(help="Mean hours between failures of one node on demand.")],
    step_seconds: Annotated[
        float | None,
        typer.Option(help="Of one step on all nodes; a short run's history tells. Default: estimated for H100 GPUs."),
    ] = None,
    min_nodes: Annotated[int, typer.Option(min=1, help="Fewest that an elastic run trains with.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs in a node.")] = 8,
    replace_minutes: Annotated[float, typer.Option(help="Until a failed node is replaced.")] = 10.0,
    spot_mtbf_hours: Annotated[
        float | None, typer.Option(help="Mean hours until a spot node is taken back; shows spot nodes too.")
    ] = None,
    spot_replace_minutes: Annotated[float, typer.Option(help="Until another spot node is there.")] = 30.0,
    restart_seconds: Annotated[float, typer.Option(help="From a failure to the first step after it.")] = 60.0,
    stall_seconds: Annotated[float, typer.Option(help="Training stands still for one checkpoint.")] = 1.0,
    trials: Annotated[int, typer.Option(min=1, help="Runs to simulate; means are shown.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the failures.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Predict how long a recipe takes on nodes that fail, with a fixed and with an elastic number of workers.

    Shows wall-clock, goodput, lost steps and GPU hours at the recipe's checkpoint interval and at the best one, on
    nodes on demand and, where --spot-mtbf-hours is given, on spot nodes. Starts nothing.
    """
    from dataclasses import asdict, replace

    from jobs.recipe.checkpoint_interval import IntervalRule
    from jobs.recipe.plan import DatasetSize
    from jobs.recipe.schedule import Schedule, order_of
    from jobs.recipe.simulation import Scenario, prediction_row, predictions, scenario_lines
    from jobs.recipe.sizing import H100_FLOPS_PER_SECOND, NodeType, estimated_step_seconds

    resolved = amended_recipe(recipe, overrides)
    size = DatasetSize.of(open_session().storage, resolved)
    steps = Schedule.of(resolved, order_of(resolved, size.samples).steps_per_epoch).total_steps
    rule = IntervalRule.of(resolved)
    for option, hours in (("--mtbf-hours", mtbf_hours), ("--spot-mtbf-hours", spot_mtbf_hours)):
        if hours is not None and not hours > 0:
            raise UserError(option, "must be above 0", hours, "give a larger one")
    scenario = Scenario(
        steps=steps,
        step_seconds=estimated_step_seconds(resolved, NodeType(gpus_per_node, H100_FLOPS_PER_SECOND), nodes)
        if step_seconds is None
        else step_seconds,
        nodes=nodes,
        min_nodes=min_nodes,
        mtbf_seconds=mtbf_hours * 3600,
        replace_seconds=replace_minutes * 60,
        restart_seconds=restart_seconds,
        stall_seconds=stall_seconds,
        interval_steps=1,  # until the rest is known to be sound
        gpus_per_node=gpus_per_node,
    )
    markets = {"on-demand": scenario}
    if spot_mtbf_hours is not None:
        markets["spot"] = replace(
            scenario, mtbf_seconds=spot_mtbf_hours * 3600, replace_seconds=spot_replace_minutes * 60
        )
    markets = {
        market: replace(
            one, interval_steps=rule.simulated_steps(one.step_seconds, one.stall_seconds, one.group_mtbf_seconds)
        )
        for market, one in markets.items()
    }
    found = {market: predictions(one, trials=trials, seed=seed) for market, one in markets.items()}
    if as_json:
        print_json(
            {
                "scenarios": {market: asdict(one) for market, one in markets.items()},
                "step_seconds_estimated": step_seconds is None,
                "predictions": [{"market": market, **asdict(one)} for market in found for one in found[market]],
            }
        )
        return
    print_pairs(scenario_lines(markets, is_estimate=step_seconds is None))
    columns = ("nodes", "policy", "interval", "wall", "goodput", "lost", "restarts", "waiting", "GPU-h")
    print_table(columns, [(market, *prediction_row(one)) for market, ones in found.items() for one in ones])


@app.command(cls=at_cluster("trace"))
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    run: RunOption = "",
    trace: TraceOption = "",
    supervised: Annotated[
        bool,
        typer.Option(
            "--supervised", help="Start the driver again when it is killed, as a submitted job does; for a RayJob."
        ),
    ] = False,
    strict: Strict = False,
) -> None:
    """Train in the foreground, on the cluster that RAY_ADDRESS names or on the local stack.

    Ctrl-C, or SIGTERM, saves a checkpoint and stops. The same command resumes.
    """
    from jobs.control.run_plan import plan_run
    from jobs.control.workflow import train_here, train_supervised
    from jobs.remote.frames import CALLER_VARIABLE

    session, resolved = open_session(), amended_recipe(recipe, overrides, strict=strict)
    name = run or resolved.name
    if supervised and CALLER_VARIABLE in session.environ:
        remedy = "take `convmae submit`, whose job is supervised"
        raise UserError("--supervised", "must be given where the cluster is", "a command from elsewhere", remedy)
    if supervised:
        train_supervised(session, plan_run(session, resolved, name, trace, drives=False, is_patient=True))
    else:
        train_here(session, plan_run(session, resolved, name, trace))


@app.command(hidden=True)
def drive(run_url: str, trace: TraceOption = "") -> None:
    """What a submitted job runs: the run whose directory is `run_url`."""
    from jobs.control.run_plan import plan_run
    from jobs.control.unreported_end import end_noted
    from jobs.control.workflow import train_here

    session = open_session(verbose=True)  # the job's log is the only one of the ranks that a user has
    directory = session.run(run_url)
    with end_noted(directory):
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
    """Train as a Ray job, which goes on when this terminal is closed. The same command resumes."""
    from jobs.control.run_plan import plan_run
    from jobs.control.workflow import train_as_job

    session, resolved = open_session(), amended_recipe(recipe, overrides, strict=strict)
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
    """Go on with a run that was stopped or cut off, as a Ray job, by the recipe in its directory.

    FIELD=VALUE may change where and how it executes (max_workers=8), not what it computes.
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
    """List the runs, with what each is doing."""
    from jobs.report.status import list_cells, status_or_error
    from jobs.run.directory import list_runs

    session = open_session()
    root = session.run_root(run_root)
    session.storage.check(root, write=False)
    session.remember_run_root(root)
    rows = [status_or_error(run) for run in list_runs(session.storage, root)]
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
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it until the run ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run is doing, and its events.

    With --watch and --json, one JSON object a line.
    """
    from jobs.report.status import event_line, run_status, status_lines
    from jobs.report.watch import status_display, watch_run

    directory = existing_run(open_session(), run, run_root)
    if watch:
        with status_display(as_json=as_json) as show, contextlib.suppress(KeyboardInterrupt):
            watch_run(directory, show)
        return
    current = run_status(directory)
    if as_json:
        print_json({**current, "events": directory.read_events()})
        return
    print_pairs(status_lines(current))
    for event in directory.read_events()[-10:]:
        say(event_line(event))


@app.command(cls=at_run())
def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    run_root: RunRoot = "",
    as_json: AsJson = False,
) -> None:
    """Print what a submitted run's newest job printed; with --verbose, also lines of Ray's own.

    With --json, one object a line: the job, and a line of what it printed.
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
    """Ask a run to save a checkpoint and end; returns when it has."""
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
    say(f"{directory.name}: {heartbeat['state']} at step {heartbeat['step']}; `convmae resume {run}` goes on")


@app.command(cls=at_run())
def history(run: RunName, run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """Print one line a step: step, epoch, loss, learning rate, world size, attempt."""
    for row in existing_run(open_session(), run, run_root).read_history():
        if as_json:
            sys.stdout.write(json.dumps(row) + "\n")
        else:
            line = (
                f"step {row['step']:>8}  epoch {row['epoch']:>4}  loss {figure(row['loss'], '.6f')}  "
                f"lr {row['learning_rate']:.3e}  world {row['world_size']:>3}  attempt {row['attempt']:>3}"
            )
            say(line)


@app.command(cls=at_store("url", "other"))
def trace(
    url: Annotated[str, typer.Argument(help="URL that `--trace` was given.")],
    other: Annotated[str, typer.Argument(help="Another, to compare with.", show_default=False)] = "",
) -> None:
    """Print what each rank consumed, one JSON object for each step and rank; or compare two traces.

    With OTHER: one line for each step in which samples, crops, flips, masks or learning rates differ, whatever the
    world sizes; exit code 1 if there is one.
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
    """Print one line for each sample that the run found unusable: where it lies, what is wrong, what stood in."""
    for row in existing_run(open_session(), run, run_root).read_quarantine():
        if as_json:
            sys.stdout.write(json.dumps(row) + "\n")
        else:
            line = f"step {row['step']:>8}  sample {row['id']}  {row['fault']}  {row['url']}: {row['reason']}"
            say(f"{line}; sample {row['substitute']} stood in")


@app.command(cls=at_run())
def report(run: RunName, run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """Write the run's report.html, with a picture of reconstructions from its newest checkpoint."""
    from jobs.control.finish import write_run_report

    url = write_run_report(existing_run(open_session(), run, run_root))
    if as_json:
        print_json({"run": run, "report": url})
    else:
        say(url)
