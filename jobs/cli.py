"""The `convmae` command. Each command checks its input, calls one function, and prints what it did.

Exit codes: 0 done, 1 failed, 2 bad input (one line on standard error, nothing started, nothing left behind).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from jobs.errors import RunError, RunFailedError
from jobs.terminal import bytes_text, figure, print_json, print_pairs, progress_bar, say
from pipeline.errors import UserError

app = typer.Typer(
    name="convmae",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Pretrain ConvMAE: photographs → WebDataset shards → Ray + DeepSpeed → one checkpoint.

On one machine, from nothing: `convmae up`, `convmae shard PHOTOS s3://convmae/datasets/mine`,
`convmae submit tiny data=s3://convmae/datasets/mine --run first --follow`, `convmae report first`, `convmae down`.

On a cluster, set RAY_ADDRESS and the AWS_* variables; the commands are the same.""",
)
RecipeName = Annotated[
    str, typer.Argument(help="Name of a recipe, or a .toml file that amends one.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[FIELD=VALUE]...", help="Fields to change: epochs=400 model.mask_ratio=0.6"),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or the URL of its directory.")]
RunRoot = Annotated[str, typer.Option("--run-root", help="URL under which runs are kept; default: the local stack's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Salvage = Annotated[bool, typer.Option("--salvage", help="Take what is left of damaged tars; else they are refused.")]
World = Annotated[int, typer.Option(help="Ranks; at most as many as lanes.")]
OrderSeed = Annotated[int, typer.Option(help="Of the order; a recipe's `seed`.")]
Block = Annotated[int, typer.Option(help="Samples in a block; a recipe's `block_samples`.")]
Window = Annotated[int, typer.Option(help="Blocks in a lane's window; a recipe's `window_blocks`.")]
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


@app.command()
def up(
    s3_port: Annotated[int, typer.Option(help="Port of the S3 server; 0: a free one.")] = 0,
    ray_port: Annotated[int, typer.Option(help="Port of the Ray head; 0: a free one.")] = 0,
    dashboard_port: Annotated[int, typer.Option(help="Port of the Ray dashboard; 0: a free one.")] = 0,
    prometheus_port: Annotated[int, typer.Option(help="Port of Prometheus; 0: a free one.")] = 0,
    cpus: Annotated[int, typer.Option(help="Logical CPUs that Ray may give out; 0: those of the machine.")] = 0,
) -> None:
    """Start the local stack: an S3 server, a Ray head, and Prometheus if it is installed.

    Everything listens on loopback only, on free ports, with credentials made for this stack. Data and state are in
    `.convmae` (or $CONVMAE_HOME). When it is up already, nothing happens; what died is started again.
    """
    from jobs import stack
    from jobs.session import home_folder

    started = stack.up(
        home_folder(os.environ),
        s3_port=s3_port,
        ray_port=ray_port,
        dashboard_port=dashboard_port,
        prometheus_port=prometheus_port,
        num_cpus=cpus or None,
        on_event=say,
    )
    for name, service in started.status().items():
        say(f"{name}: {service.detail}")
    say(f"state and data: {home_folder(os.environ)}")


@app.command()
def down() -> None:
    """Stop what `convmae up` started, by pid. Data stay, and the next `up` finds them."""
    from jobs import stack
    from jobs.session import home_folder

    stack.down(home_folder(os.environ), on_event=say)


@app.command()
def doctor(
    store: Annotated[
        str, typer.Option(help="URL under which runs will be kept; default: the local stack's.", show_default=False)
    ] = "",
    cache_dir: Annotated[str, typer.Option(help="The recipe's cache_dir, if it has one.", show_default=False)] = "",
    gpu: Annotated[bool, typer.Option("--gpu", help="A node without a GPU is a failure.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the machine, the cluster and the store, and say what to do about each finding.

    Versions and clocks of all nodes, reading, writing and conditional writing, bandwidth of each node, disks, shared
    memory, GPUs, and an all-reduce over all nodes. Exit code 1 if something failed.
    """
    from jobs.diagnosis import exit_code, finding_lines
    from jobs.doctor import examine

    findings = []
    for finding in examine(_session(), store, [cache_dir] if cache_dir else [], wants_gpu=gpu):
        findings.append(finding)
        if not as_json:
            for line in finding_lines([finding]):
                say(line)
    if as_json:
        print_json([finding.to_json() for finding in findings])
    if code := exit_code(findings):
        raise typer.Exit(code)


@app.command()
def shard(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of images or of class folders; a tar, a folder of tars, a pattern like `00{000..123}.tar`; "
            "or a text file with one path or URL a line, each with a label behind a tab or without."
        ),
    ],
    dest: Annotated[str, typer.Argument(help="URL of the data set to make: s3://bucket/path, or a folder.")],
    *,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Images in one tar; default: 1000.", show_default=False)
    ] = None,
    shard_bytes: Annotated[
        str, typer.Option(help="Bytes in one tar instead, like 256MB, counted before images are encoded again.")
    ] = "",
    max_side: Annotated[
        int | None, typer.Option(help="Shrink larger images to this many pixels on the longer side.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help="Encode every image again at this JPEG quality; default: keep original bytes.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffle before images are dealt to shards.")] = 0,
    salvage: Salvage = False,
) -> None:
    """Make a data set: WebDataset tars, their indexes, and a manifest, in parallel Ray tasks.

    JPEGs keep their bytes, other formats become JPEG. An image that does not decode is skipped, counted and listed.
    The same command again goes on where it was cut off, or says that there is nothing to do.
    """
    from jobs.datasets import make_dataset
    from jobs.terminal import parsed_bytes
    from pipeline.photo import Encoding
    from pipeline.shard_plan import Sharding

    if samples_per_shard is None and not shard_bytes:
        samples_per_shard = 1000
    size = parsed_bytes("--shard-bytes", shard_bytes) if shard_bytes else None
    make_dataset(
        _session(), source, dest, Sharding(samples_per_shard, size, seed, Encoding(max_side, quality)), salvage=salvage
    )


@app.command()
def index(
    url: Annotated[
        str, typer.Argument(help="A folder of WebDataset tars, a tar, or a pattern like `s3://b/x/00{000..123}.tar`.")
    ],
    out: Annotated[
        str, typer.Option(help="URL for indexes and manifest; default: beside the tars.", show_default=False)
    ] = "",
    deep: Annotated[bool, typer.Option("--deep", help="Decode every image, and leave out those that do not.")] = False,
    salvage: Salvage = False,
) -> None:
    """Make a data set of tars that were made elsewhere, without rewriting them: indexes and a manifest.

    Each tar is read once, in parallel Ray tasks. A tar that ends early or has a damaged header is named with the
    offset. The same command again goes on where it was cut off.
    """
    from jobs.datasets import index_foreign

    index_foreign(_session(), url, out, deep=deep, salvage=salvage)


@app.command()
def verify(
    url: Annotated[str, typer.Argument(help="URL of a data set.")],
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every image.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a data set and list each fault: shard, key, offset, and what is wrong.

    Checks sizes, ETags, indexes, tar headers, labels and the CRC32C of every image. Exit code 1 if there is a fault.
    """
    from jobs.datasets import verify as verify_and_say

    verify_and_say(_session(), url, deep=deep, as_json=as_json)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="RECIPE_OR_DATASET", help="A recipe, or the URL of a data set.")],
    overrides: Overrides = None,
    *,
    batch: Annotated[int | None, typer.Option(help="Global batch size; default: by the data set's size.")] = None,
    lanes: Annotated[int | None, typer.Option(help="Lanes; default: by the batch.")] = None,
    world: Annotated[int | None, typer.Option(help="Ranks; default: 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order; default: 0.")] = None,
    block: Annotated[int | None, typer.Option(help="Samples in a block; default: 32.")] = None,
    window: Annotated[int | None, typer.Option(help="Blocks in a lane's window; default: 64.")] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Read some index rows, to tell how labels mix.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a recipe as it would run (parameters, FLOPs, steps, order, GETs), or a data set and how it would be read.

    A recipe is changed by FIELD=VALUE, the plan of a data set by options. The design effect says how well batches are
    mixed: 1.0 for independent draws.
    """
    given = {"batch": batch, "lanes": lanes, "world": world, "seed": seed, "block": block, "window": window}
    numbers = {name: value for name, value in given.items() if value is not None}
    session = _session()
    if _is_dataset(target):
        from jobs.reading_plan import inspected_dataset

        if overrides:
            remedy = "give options like --batch 4096, or inspect a recipe with data=URL"
            raise UserError("argument", "must not be given with a data set", overrides[0], remedy)
        session.storage.check(target, write=False)
        inspected = inspected_dataset(session.storage, target, numbers, labels=labels)
        print_json(inspected.to_json()) if as_json else print_pairs(inspected.lines())
        return
    from jobs.plan import DatasetSize, recipe_json, recipe_lines

    if numbers or labels:
        name = f"--{next(iter(numbers), 'labels')}"
        raise UserError("option", "must not be given with a recipe", name, "write FIELD=VALUE, like lanes=64")
    recipe = _recipe(target, overrides)
    size = DatasetSize.of(session.storage, recipe)
    print_json(recipe_json(recipe, size)) if as_json else print_pairs(recipe_lines(recipe, size))


@app.command()
def simulate(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    nodes: Annotated[int, typer.Option(help="Nodes that the run is given.")],
    mtbf_hours: Annotated[float, typer.Option(help="Mean hours between failures, or reclaims, of one node.")],
    step_seconds: Annotated[float, typer.Option(help="Of one step on all nodes; a short run's history tells.")],
    min_nodes: Annotated[int, typer.Option(help="Fewest that an elastic run trains with.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs in a node, for GPU hours.")] = 8,
    replace_minutes: Annotated[float, typer.Option(help="Until a failed node is replaced.")] = 10.0,
    restart_seconds: Annotated[float, typer.Option(help="From a failure to the first step after it.")] = 60.0,
    stall_seconds: Annotated[float, typer.Option(help="Training stands still for one checkpoint.")] = 1.0,
    trials: Annotated[int, typer.Option(min=1, help="Runs to simulate; means are shown.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the failures.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Predict how long a recipe takes on nodes that fail, with a fixed and with an elastic number of workers.

    Shows wall-clock, goodput, lost steps and GPU hours at the recipe's checkpoint interval and at the best one. For
    spot nodes give their hours between reclaims and the minutes until one is free again. Starts nothing.
    """
    from dataclasses import asdict

    from jobs.plan import DatasetSize
    from jobs.schedule import Schedule
    from jobs.simulation import Scenario, prediction_row, predictions, scenario_lines
    from jobs.trainer import order_of

    resolved = _recipe(recipe, overrides)
    size = DatasetSize.of(_session().storage, resolved)
    steps = Schedule.of(resolved, order_of(resolved, size.samples).steps_per_epoch).total_steps
    scenario = Scenario(
        steps=steps,
        step_seconds=step_seconds,
        nodes=nodes,
        min_nodes=min_nodes,
        mtbf_seconds=mtbf_hours * 3600,
        replace_seconds=replace_minutes * 60,
        restart_seconds=restart_seconds,
        stall_seconds=stall_seconds,
        interval_steps=resolved.checkpoint_every_steps,
        gpus_per_node=gpus_per_node,
    )
    found = predictions(scenario, trials=trials, seed=seed)
    if as_json:
        print_json({"scenario": asdict(scenario), "predictions": [asdict(prediction) for prediction in found]})
        return
    print_pairs(scenario_lines(scenario))
    columns = ("policy", "interval", "wall", "goodput", "lost", "restarts", "waiting", "GPU hours")
    table = Table(*columns, box=None)
    for prediction in found:
        table.add_row(*prediction_row(prediction))
    Console(highlight=False).print(table)


@app.command()
def order(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="URL of a data set.")],
    *,
    batch: Annotated[int, typer.Option(help="Global batch size.")],
    lanes: Annotated[int, typer.Option(help="Lanes; divides the batch.")],
    world: World = 1,
    rank: Annotated[int | None, typer.Option(help="Only this rank; default: all.", show_default=False)] = None,
    seed: OrderSeed = 0,
    step: Annotated[int, typer.Option(help="First step, from 0.")] = 0,
    steps: Annotated[int, typer.Option(help="How many steps.")] = 1,
    block: Block = 32,
    window: Window = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object a line.")] = False,
) -> None:
    """Print which samples make up each step, rank by rank, in order. Reads indexes, no image.

    With --json, each line is one object for a step and rank: step, epoch, rank, world_size, keys, shards, samples. The
    last three are lists in the order in which the rank's batch holds the samples, `samples` their numbers in the data
    set.
    """
    from jobs.reading_plan import listed_steps
    from pipeline.dataset import Dataset
    from pipeline.order import Order

    session = _session()
    session.storage.check(dataset, write=False)
    opened = Dataset.open(session.storage, dataset)
    plan = Order(opened.samples, batch, lanes, seed, block, window)
    for row in listed_steps(opened, plan, step, steps, world_size=world, rank=rank):
        if as_json:
            say(json.dumps(row))
        else:
            say(f"step {row['step']}  epoch {row['epoch']}  rank {row['rank']}  " + " ".join(row["keys"]))


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    run: RunOption = "",
    trace: TraceOption = "",
    strict: Strict = False,
) -> None:
    """Train in the foreground, on the cluster that RAY_ADDRESS names or on the local stack.

    Ctrl-C, or SIGTERM, saves a checkpoint and stops. The same command resumes.
    """
    from jobs.driver import plan_run
    from jobs.workflow import train_here

    session, resolved = _session(), _recipe(recipe, overrides, strict=strict)
    train_here(session, plan_run(session, resolved, run or resolved.name, trace))


@app.command(hidden=True)
def drive(run_url: str, trace: TraceOption = "") -> None:
    """What a submitted job runs: the run whose directory is `run_url`."""
    from jobs.driver import plan_run
    from jobs.workflow import train_here

    session = _session()
    root, _, name = run_url.rpartition("/")
    recipe = session.run(run_url).read_recipe().amended({"run_root": root})
    train_here(session, plan_run(session, recipe, name, trace))


@app.command()
def submit(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    run: RunOption = "",
    trace: TraceOption = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show progress until the run ends.")] = False,
    strict: Strict = False,
) -> None:
    """Train as a Ray job, which goes on when this terminal is closed. The same command resumes."""
    from jobs.driver import plan_run
    from jobs.workflow import train_as_job

    session, resolved = _session(), _recipe(recipe, overrides, strict=strict)
    train_as_job(session, plan_run(session, resolved, run or resolved.name, trace), follow=follow)


@app.command(name="list")
def list_command(run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """List the runs, with what each is doing."""
    from jobs.run_directory import list_runs
    from jobs.status import run_status

    session = _session()
    root = session.run_root(run_root)
    session.storage.check(root, write=False)
    rows = [run_status(run) for run in list_runs(session.storage, root)]
    if as_json:
        print_json(rows)
        return
    table = Table("run", "state", "step", "loss", "images/s", "workers", box=None)
    for row in rows:
        figures = (figure(row.get("loss"), ".4f"), figure(row.get("images_per_second"), ".0f"))
        steps = f"{row['step']}/{row['total_steps']}"
        workers = figure(row.get("world_size"), "d")
        table.add_row(row["run"], row["state"], steps, *figures, workers)
    say(f"{len(rows)} runs under {root}")
    if rows:
        Console(highlight=False).print(table)


@app.command()
def status(
    run: RunName,
    run_root: RunRoot = "",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it until the run ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run is doing, and its events.

    With --watch and --json, one JSON object a line.
    """
    from jobs.status import event_line, run_status, status_lines
    from jobs.watch import status_display, watch_run

    directory = _existing_run(_session(), run, run_root)
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


@app.command()
def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    run_root: RunRoot = "",
) -> None:
    """Print what a submitted run's newest job printed."""
    from jobs import submission

    session = _session()
    for piece in submission.log_lines(session, _existing_run(session, run, run_root), follow=follow):
        sys.stdout.write(piece)
        sys.stdout.flush()


@app.command()
def stop(run: RunName, run_root: RunRoot = "") -> None:
    """Ask a run to save a checkpoint and end; returns when it has."""
    from jobs.driver import FINAL_STATES, is_live

    directory = _existing_run(_session(), run, run_root)
    if not is_live(directory):
        state = directory.read_heartbeat().get("state", "submitted")
        raise RunError(
            "run", "must be running to be stopped", f"{directory.name} ({state})", "there is nothing to stop"
        )
    directory.write_stop_request()
    say(f"asked {directory.name} to save and stop")
    while (heartbeat := directory.read_heartbeat())["state"] not in FINAL_STATES:
        time.sleep(1.0)
    say(f"{directory.name}: {heartbeat['state']} at step {heartbeat['step']}; the command that began it resumes it")


@app.command()
def history(run: RunName, run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """Print one line a step: step, epoch, loss, learning rate, world size, attempt."""
    for row in _existing_run(_session(), run, run_root).read_history():
        if as_json:
            sys.stdout.write(json.dumps(row) + "\n")
        else:
            line = (
                f"step {row['step']:>8}  epoch {row['epoch']:>4}  loss {figure(row['loss'], '.6f')}  "
                f"lr {row['learning_rate']:.3e}  world {row['world_size']:>3}  attempt {row['attempt']:>3}"
            )
            sys.stdout.write(line + "\n")


@app.command()
def trace(
    url: Annotated[str, typer.Argument(help="URL that `--trace` was given.")],
    other: Annotated[str, typer.Argument(help="Another, to compare with.", show_default=False)] = "",
) -> None:
    """Print what each rank consumed, one JSON object for each step and rank; or compare two traces.

    With OTHER: one line for each step in which samples, crops, flips, masks or learning rates differ, whatever the
    world sizes; exit code 1 if there is one.
    """
    from jobs.trace import differences, read_trace

    storage = _session().storage
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


@app.command()
def quarantine(run: RunName, run_root: RunRoot = "", as_json: AsJson = False) -> None:
    """Print one line for each sample that the run found unusable: where it lies, what is wrong, what stood in."""
    for row in _existing_run(_session(), run, run_root).read_quarantine():
        if as_json:
            sys.stdout.write(json.dumps(row) + "\n")
        else:
            line = f"step {row['step']:>8}  sample {row['id']}  {row['fault']}  {row['url']}: {row['reason']}"
            sys.stdout.write(f"{line}; sample {row['substitute']} stood in\n")


@app.command()
def checkpoints(
    run: RunName,
    verify: Annotated[bool, typer.Option("--verify", help="Compare size and CRC32C of every file.")] = False,
    run_root: RunRoot = "",
    as_json: AsJson = False,
) -> None:
    """List a run's checkpoints: step, epoch, time, world size, ZeRO stage, bytes, kind, and whether they are whole.

    Milestones stay for ever, the last ones until newer ones push them out. Exit code 1 if there is a fault; each is
    listed.
    """
    from jobs.checkpoint_check import list_checkpoints

    directory = _existing_run(_session(), run, run_root)
    with progress_bar("reading", sys.stderr) as show:
        rows = list_checkpoints(directory, verify=verify, on_progress=show)
    faults = [fault for row in rows for fault in row.faults]
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        table = Table("step", "epoch", "time (UTC)", "ranks", "ZeRO", "bytes", "kind", "verified", box=None)
        for row in rows:
            table.add_row(*row.cells())
        say(f"{len(rows)} checkpoints of {directory.url}")
        if rows:
            Console(highlight=False).print(table)
        for fault in faults:
            say(fault)
    if faults:
        sys.stderr.write(f"failed: {len(faults)} faults in {sum(bool(row.faults) for row in rows)} checkpoints\n")
        sys.exit(1)


@app.command()
def prune(
    run: RunName,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Newest checkpoints that stay; default: the recipe's.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only show what would be deleted.")] = False,
    run_root: RunRoot = "",
) -> None:
    """Show which checkpoints and left-over files can go; with --yes, delete them.

    The newest whole checkpoint and all milestones stay, and what a live run may be uploading.
    """
    from jobs.retention import carry_out, plan_pruning, pruning_lines

    directory = _existing_run(_session(), run, run_root)
    plan = plan_pruning(directory, keep or directory.read_recipe().keep_checkpoints)
    for line in pruning_lines(plan):
        say(line)
    if yes:
        carry_out(directory, plan)
        say(f"deleted {bytes_text(plan.bytes)}")
    elif plan.bytes or plan.commits:
        say(f"nothing was deleted; --yes deletes {bytes_text(plan.bytes)}")


@app.command()
def consolidate(
    run: RunName,
    *,
    step: Annotated[int, typer.Option(help="A committed step; default: the newest.", show_default=False)] = 0,
    dtype: Annotated[str, typer.Option(help="Of floating-point tensors: fp32, bf16 or fp16.")] = "fp32",
    shard_bytes: Annotated[
        str, typer.Option(help="Several files of at most this size, like 5GB, and an index; default: one file.")
    ] = "",
    out: Annotated[
        str, typer.Option(help="A .safetensors file or a folder; default: in the run directory.", show_default=False)
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    run_root: RunRoot = "",
) -> None:
    """Write a checkpoint's weights as safetensors, without holding them in memory. The run may be training meanwhile.

    Large checkpoints are copied by Ray tasks, small ones here. A result is checked while it is made and read back for
    its SHA-256. The same command again goes on where it was cut off.
    """
    from jobs.consolidate import Wanted
    from jobs.consolidate_command import consolidate_and_say
    from jobs.terminal import parsed_bytes

    wanted = Wanted(dtype, parsed_bytes("--shard-bytes", shard_bytes) if shard_bytes else None, out)
    session = _session()
    consolidate_and_say(session, _existing_run(session, run, run_root), step or None, wanted, force=force)


@app.command()
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A run, or the path or URL of a consolidated .safetensors file."),
    ],
    *,
    name: Annotated[str, typer.Option("--format", help="official, backbone, hf or onnx.")],
    step: Annotated[
        int | None, typer.Option(min=1, help="A step of the run; default: the newest.", show_default=False)
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder, or file; default: `exports` in the run directory.", show_default=False)
    ] = "",
    image_size: Annotated[
        str, typer.Option(help="Of the ONNX model's images: 512, or 512x768; default: the pretraining's.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    run_root: RunRoot = "",
) -> None:
    """Write a checkpoint in the format of others.

    `official`: a .pth for the official ConvMAE code, for pretraining and fine-tuning. `backbone`: safetensors that
    `model.Backbone` loads. `hf`: a folder with config.json, model.safetensors and a model card. `onnx`: the dense
    encoder with its three maps, compared with PyTorch before it is written; needs the extra `export`.
    """
    from jobs import weights_file
    from jobs.export import FORMATS, Source, check_format
    from jobs.export import export as export_weights
    from pipeline.storage import Storage

    session = _session()
    check_format(name)
    if checkpoint.endswith(weights_file.SUFFIX):
        if step is not None:
            raise UserError("--step", "must not be given with a file", step, "give the run, or the step's own file")
        url, directory = Storage.absolute(checkpoint), None
        weights = weights_file.of_file(session.storage, url)
        default = url.rpartition("/")[0]
    else:
        directory = _existing_run(session, checkpoint, run_root)
        weights, default = weights_file.of_run(directory, step), directory.path("exports")
    source = Source.of(weights, directory, image_size)
    target = out or (default if FORMATS[name].suffix else f"{default}/{source.stem}-{name}")
    for written in export_weights(source, name, session.storage, target, force=force):
        say(f"{name}: {written.url} ({bytes_text(written.bytes)}, sha256 {written.sha256[:16]}…)")


@app.command(name="import")
def import_command(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A .pth of the official pretraining, or a consolidated file.")
    ],
    out: Annotated[str, typer.Argument(help="The .safetensors file to write, as a path or URL.")],
    overrides: Overrides = None,
    *,
    recipe: Annotated[str, typer.Option(help="Whose model takes the weights.")] = "convmae_base_official",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Bring weights in that a new run can start from, with `init_from=OUT`.

    The file is read without running any code in it. Weights of another architecture are refused with every name that
    is missing or unexpected.
    """
    from jobs.initial_weights import import_weights
    from pipeline.storage import Storage

    session, resolved = _session(), _recipe(recipe, overrides)
    places = [Storage.absolute(url) for url in (source, out)]
    done = import_weights(session.storage, places[0], places[1], resolved.model, force=force)
    say(f"{done.url} ({bytes_text(done.bytes)}, sha256 {done.sha256})")
    say(f"from {places[0]} (sha256 {done.source_sha256})")
    changes = "".join(f" {change}" for change in overrides or ())
    say(f"next: `convmae submit {recipe}{changes} data=URL init_from={done.url} --run NAME`")


@app.command()
def report(run: RunName, run_root: RunRoot = "") -> None:
    """Write the run's report.html, with a picture of reconstructions from its newest checkpoint."""
    from jobs.finish import write_run_report

    say(write_run_report(_existing_run(_session(), run, run_root)))


@app.command()
def demo(
    images: Annotated[
        str, typer.Option(help="Folder of your own photographs; default: those of Python packages.")
    ] = "",
) -> None:
    """The main job from photographs to a report, on this machine, in about five minutes. What `make pretrain` runs."""
    from jobs.demo import run_demo

    run_demo(os.environ, images)


def main() -> None:
    """Entry point: bad input ends in one line and exit code 2, a failed run in one line and exit code 1."""
    from jobs.stack import StackError

    try:
        sys.exit(app(standalone_mode=False) or 0)
    except TyperException as error:  # what Typer itself refuses: an unknown option, text where a number should be
        sys.stderr.write(_usage_text(error))
        sys.exit(2)
    except typer.Abort:
        sys.exit(1)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except (RunFailedError, StackError, OSError) as error:
        sys.stderr.write(f"failed: {error}\n")
        sys.exit(1)


def _usage_text(error: Any) -> str:
    """One line; nothing where the help was printed, because the command was given nothing at all."""
    message: str = error.format_message()
    return f"error: {message}\n" if message else ""


def _session() -> Any:
    from jobs.session import Session

    session = Session.open(os.environ)
    session.export()
    return session


def _is_dataset(target: str) -> bool:
    """Whether `target` is a place; a name, or a .toml file, is a recipe."""
    if target.endswith(".toml"):
        return False
    if "/" in target or not Path(target).is_dir():
        return "/" in target
    from jobs.recipes import recipe_names

    return target not in recipe_names()


def _recipe(name: str, overrides: Iterable[str] | None, *, strict: bool = False) -> Any:
    from jobs.recipe import parse_overrides
    from jobs.recipes import named_recipe

    changes = [*(overrides or ()), *(["on_damaged_checkpoint=fail"] if strict else [])]
    return named_recipe(name).amended(parse_overrides(changes))


def _existing_run(session: Any, name: str, run_root: str) -> Any:
    """The run's directory.

    Raises:
        RunError: If there is none; names the nearest that exists.
    """
    from jobs.run_directory import list_runs, unknown_run

    directory = session.run(name, run_root)
    root = directory.url.rpartition("/")[0]
    session.storage.check(root, write=False)
    if not directory.exists():
        raise unknown_run(directory, [known.name for known in list_runs(session.storage, root)])
    return directory


if __name__ == "__main__":
    main()
