"""Checkpoints and weights of runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.completion import run_names
from jobs.cli.elsewhere import at_run, at_store, go_there
from jobs.cli.shared import AsJson, Overrides, RunName, RunRoot, amended_recipe, existing_run, open_session
from jobs.errors import RunFailedError
from jobs.terminal import bytes_text, print_json, print_table, progress_bar, say
from pipeline.errors import UserError

if TYPE_CHECKING:
    from jobs.export.written import Exported

app = typer.Typer()


@app.command(cls=at_run())
def checkpoints(
    run: RunName,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the size and CRC32C of every file with its commit.")
    ] = False,
    run_root: RunRoot = "",
    as_json: AsJson = False,
) -> None:
    """List a run's checkpoints: step, epoch, time, world size, ZeRO stage, bytes, kind, and whether they are intact.

    Milestones are kept permanently, the last checkpoints until newer ones replace them. Exit code 1 if there is a
    fault; each is listed.
    """
    from jobs.checkpoint.check import list_checkpoints

    directory = existing_run(open_session(), run, run_root)
    with progress_bar("reading", sys.stderr) as show:
        rows = list_checkpoints(directory, verify=verify, on_progress=show)
    faults = [fault for row in rows for fault in row.faults]
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        say(f"{len(rows)} checkpoints of {directory.url}")
        columns = ("step", "epoch", "time (UTC)", "ranks", "ZeRO", "bytes", "kind", "verified")
        print_table(columns, [row.cells() for row in rows])
        for fault in faults:
            say(fault)
    if faults:
        sys.stderr.write(f"failed: {len(faults)} faults in {sum(bool(row.faults) for row in rows)} checkpoints\n")
        sys.exit(1)


@app.command(cls=at_run())
def replay(  # noqa: PLR0917 - typer's
    run: RunName,
    first: Annotated[int, typer.Option("--from", min=0, help="Step of the checkpoint to begin with; 0: the start.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many to compute again.")],
    threads: Annotated[
        int, typer.Option(min=0, help="Of PyTorch. 0: as many as a worker of the run had, from its cpus_per_worker.")
    ] = 0,
    run_root: RunRoot = "",
    as_json: AsJson = False,
) -> None:
    """Compute steps of a run again, on this machine, and compare losses and digests with its history.

    For runs whose bits are the same at any world size. Exit code 1 where they differ: then the run or this machine
    computed something else, if both have the same kind of CPU or GPU, versions and threads.
    """
    import torch

    from jobs.rank.replay import replay as replayed

    directory = existing_run(open_session(), run, run_root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = threads or max(1, int(directory.read_recipe().cpus_per_worker))
    first_apart = 0
    for step in replayed(directory, first, steps, device=device, threads=threads):
        first_apart = first_apart or (0 if step.agrees else step.step)
        if as_json:
            sys.stdout.write(json.dumps(dataclasses.asdict(step) | {"agrees": step.agrees}) + "\n")
        else:
            say(step.line())
    if first_apart:
        raise RunFailedError(f"step {first_apart} is the first that differs, on {device} with {threads} threads")
    if not as_json:
        say(f"all agree, on {device} with {threads} {'thread' if threads == 1 else 'threads'}")


@app.command(cls=at_run())
def prune(
    run: RunName,
    keep: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many of the newest checkpoints to keep; default: the recipe's.", show_default=False
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only show what would be deleted.")] = False,
    run_root: RunRoot = "",
) -> None:
    """Show which checkpoints and leftover files can be deleted; with --yes, delete them.

    The newest intact checkpoint and all milestones are kept, and whatever a live run may be uploading.
    """
    from jobs.checkpoint.retention import carry_out, plan_pruning, pruning_lines

    directory = existing_run(open_session(), run, run_root)
    plan = plan_pruning(directory, keep or directory.read_recipe().keep_checkpoints)
    for line in pruning_lines(plan):
        say(line)
    if yes:
        carry_out(directory, plan)
        say(f"deleted {bytes_text(plan.bytes)}")
    elif plan.bytes or plan.commits:
        say(f"nothing was deleted; --yes deletes {bytes_text(plan.bytes)}")


@app.command(cls=at_run("out"))
def consolidate(
    ctx: typer.Context,
    run: RunName,
    *,
    step: Annotated[
        int, typer.Option(help="Step of a committed checkpoint; default: the newest.", show_default=False)
    ] = 0,
    dtype: Annotated[str, typer.Option(help="Type of floating-point tensors: fp32, bf16 or fp16.")] = "fp32",
    shard_bytes: Annotated[
        str, typer.Option(help="Write several files of at most this size, like 5GB, and an index; default: one file.")
    ] = "",
    out: Annotated[
        str,
        typer.Option(
            help="A .safetensors file or a folder to write; default: in the run directory.", show_default=False
        ),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    run_root: RunRoot = "",
) -> None:
    """Write a checkpoint's weights as safetensors, without holding them in memory. The run may be training meanwhile.

    Large checkpoints are copied by Ray tasks, small ones here. The result is checked while it is made, and read back
    for its SHA-256. If it is interrupted, the same command resumes it.
    """
    from jobs.consolidation.consolidate import commit_of
    from jobs.consolidation.consolidate_command import consolidate_and_say, needs_cluster
    from jobs.consolidation.target import Target
    from jobs.terminal import parsed_bytes
    from pipeline.access.places import normal

    target = Target(dtype, parsed_bytes("--shard-bytes", shard_bytes) if shard_bytes else None, out and normal(out))
    session = open_session()
    directory = existing_run(session, run, run_root)
    commit = commit_of(directory, step or None)
    if needs_cluster(session, commit) and session.is_away:
        sys.exit(go_there(session, ctx, ("out",), step=commit.step))
    consolidate_and_say(session, directory, commit, target, force=force)


@app.command(cls=at_run("out"))
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A run, or the path or URL of a consolidated .safetensors file, or of a folder of several.",
            autocompletion=run_names,
        ),
    ],
    *,
    name: Annotated[
        str, typer.Option("--format", help="Format: official, backbone, hf, onnx, metrics or metrics-csv.")
    ],
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Step of one of the run's checkpoints; default: the newest.", show_default=False),
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder or file to write; default: `exports` in the run directory.", show_default=False)
    ] = "",
    image_size: Annotated[
        str, typer.Option(help="Size of the ONNX model's images: 512, or 512x768; default: that of the pretraining.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    run_root: RunRoot = "",
) -> None:
    """Write a checkpoint, or what a run recorded, in the format of another tool.

    `official`: a .pth for the official ConvMAE code, for pretraining and fine-tuning. `backbone`: safetensors that
    `model.Backbone` loads. `hf`: a folder with config.json, model.safetensors and a model card. `onnx`: the dense
    encoder with its three maps, compared with PyTorch before it is written; needs the extra `export`.

    `metrics`, `metrics-csv`: a folder of tables, Parquet or CSV, of all attempts of a run: history (a row a step,
    `superseded` where it was done again), accuracies and events.
    """
    from jobs.export.run_tables import TABLE_SUFFIXES, export_tables
    from pipeline.access.places import is_place, normal

    session = open_session()
    out = out and normal(out)
    if name in TABLE_SUFFIXES:
        for option, value in (("--step", step), ("--image-size", image_size)):
            if value:
                raise UserError(option, f"must not be given with --format {name}", value, "leave it out")
        directory = existing_run(session, checkpoint, run_root)
        target = out or directory.path("exports", f"{directory.name}-{name}")
        _say_exported(name, export_tables(directory, name, session.storage, target, force=force))
        return
    from jobs.export.formats import FORMATS, Source, check_format  # tables need no PyTorch
    from jobs.export.formats import export as export_weights
    from jobs.weights import consolidated

    check_format(name)
    if is_place(checkpoint):
        checkpoint = normal(checkpoint)
    if consolidated.is_weights(session.storage, checkpoint):
        if step is not None:
            raise UserError("--step", "must not be given with a file", step, "give the run, or the step's own file")
        url, directory = normal(checkpoint), None
        weights = consolidated.of_file(session.storage, url)
        default = consolidated.folder_beside(url)
    else:
        directory = existing_run(session, checkpoint, run_root)
        weights, default = consolidated.of_run(directory, step), directory.path("exports")
    source = Source.of(weights, directory, image_size)
    target = out or (default if FORMATS[name].suffix else f"{default}/{source.stem}-{name}")
    _say_exported(name, export_weights(source, name, session.storage, target, force=force))


def _say_exported(name: str, files: Iterable[Exported]) -> None:
    for written in files:
        note = f": {written.note}" if written.note else ""
        say(f"{name}: {written.url} ({bytes_text(written.bytes)}, sha256 {written.sha256[:16]}…){note}")


@app.command(name="import", cls=at_store("source", "out"))
def import_command(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A .pth file of the official code, or safetensors, as a path or URL."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The .safetensors file to write, as a path or URL.")],
    overrides: Overrides = None,
    *,
    recipe: Annotated[str, typer.Option(help="Recipe whose model takes the weights.")] = "convmae_base_official",
    fresh_decoder: Annotated[
        bool,
        typer.Option("--fresh-decoder", help="Take only the encoder, with a new decoder made from the recipe's seed."),
    ] = False,
    kind: Annotated[
        str, typer.Option("--format", help="`file`, or `deepspeed`: a folder that DeepSpeed's save_checkpoint wrote.")
    ] = "file",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Import weights from which a new run can start, with `init_from=OUT`.

    The file is read without running any code in it. Weights of another architecture are refused, with every name that
    is missing or unexpected. An encoder without a decoder, as in the released files, needs --fresh-decoder.
    With --format deepspeed the ranks' files of any program that trained with ZeRO 1, 2 or 3 are put together.
    """
    from jobs.weights.initial import import_weights
    from pipeline.access.places import normal

    session, resolved = open_session(), amended_recipe(recipe, overrides)
    places = [normal(url) for url in (source, out)]
    seed = resolved.seed if fresh_decoder else None
    done = import_weights(
        session.storage, places[0], places[1], resolved.model, kind=kind, fresh_decoder_seed=seed, force=force
    )
    for note in done.notes:
        say(note)
    say(f"{done.url} ({bytes_text(done.bytes)}, sha256 {done.sha256})")
    say(f"from {places[0]} (sha256 {done.source_sha256})")
    changes = "".join(f" {change}" for change in overrides or ())
    say(f"next: `convmae submit {recipe}{changes} data=URL init_from={done.url} --run NAME`")
