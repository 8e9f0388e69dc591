"""Commands on data sets: make, index and verify them, and show how they would be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.elsewhere import at_cluster, at_store, go_there, refuse_own_path
from jobs.cli.shared import AsJson, Overrides, amended_recipe, open_session
from jobs.terminal import print_json, print_pairs, say
from pipeline.access.places import normal
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.image.channels import PixelKind

app = typer.Typer()

World = Annotated[int, typer.Option(help="Ranks; at most as many as lanes.")]
OrderSeed = Annotated[int, typer.Option(help="Seed of the order; a recipe's `seed`.")]
Block = Annotated[int, typer.Option(help="Samples in a block; a recipe's `block_samples`.")]
Window = Annotated[int, typer.Option(help="Blocks in a lane's window; a recipe's `window_blocks`.")]
Salvage = Annotated[
    bool, typer.Option("--salvage", help="Use what is intact in damaged tars; without it, they are refused.")
]

AsGray = Annotated[
    bool,
    typer.Option(
        "--gray", help="Images are gray: read one channel of each, its brightness. Their bytes stay as they are."
    ),
]
BandCount = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images are TIFF or PNG with this many bands, which are read as they are; with --bits 16 also 1 or 3.",
        show_default=False,
    ),
]
BandBits = Annotated[
    int | None,
    typer.Option(help="Bits of a value in each band, 8 or 16, unsigned; default: 8.", show_default=False),
]


@app.command()
def shard(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of images or of class folders; a tar, a folder of tars, a pattern like `00{000..123}.tar`; "
            "or a text file with one path or URL per line, each optionally followed by a tab and a label.",
        ),
    ],
    dest: Annotated[
        str, typer.Argument(metavar="DEST", help="URL of the data set to make: s3://bucket/path, or a folder.")
    ],
    *,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Images in a tar; default: 1000.", show_default=False)
    ] = None,
    shard_bytes: Annotated[
        str, typer.Option(help="Bytes in a tar instead, like 256MB, counted before images are re-encoded.")
    ] = "",
    max_side: Annotated[
        int | None, typer.Option(help="Shrink larger images to this many pixels on the longer side.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help="Re-encode every image at this JPEG quality; default: keep the original bytes.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffle before images are dealt to shards.")] = 0,
    restart_markers: Annotated[
        bool,
        typer.Option(
            "--restart-markers",
            help="Rewrite JPEGs without a change to their pixels, so that crops of them decode faster. Needs jpegtran.",
        ),
    ] = False,
    gray: AsGray = False,
    bands: BandCount = None,
    bits: BandBits = None,
    salvage: Salvage = False,
    upload: Annotated[
        str,
        typer.Option(
            help="URL to which SOURCE, a folder or a tar on this machine, is copied first, and then read from."
        ),
    ] = "",
) -> None:
    """Make a data set: WebDataset tars, their indexes, and a manifest, in parallel Ray tasks.

    JPEGs keep their bytes, other formats become JPEG; with --bands they become TIFFs of the same values. An image that
    does not decode, or has other bands or bits, is skipped, counted and listed.
    If it is interrupted, the same command resumes it; once it is done, it says that there is nothing to do.
    """
    from jobs.terminal import parsed_bytes
    from pipeline.image.channels import GRAY_CHANNELS, RGB_CHANNELS
    from pipeline.image.photo import Encoding
    from pipeline.ingest.plan import Sharding

    encoding = Encoding(max_side, quality, restart_markers, _given_bands(bands, bits, gray=gray))
    session = open_session()
    if upload:
        from jobs.remote.uploads import upload_and_say

        source = upload_and_say(session.storage, normal(source), normal(upload))
    if session.is_away:
        refuse_own_path("source", source, "`--upload s3://bucket/folder` copies it there first")
        refuse_own_path("dest", dest)
        sys.exit(go_there(session, ctx, source=source, upload=""))
    from jobs.data.datasets import shard_and_say

    if samples_per_shard is None and not shard_bytes:
        samples_per_shard = 1000
    size = parsed_bytes("--shard-bytes", shard_bytes) if shard_bytes else None
    shard_and_say(
        session,
        source,
        normal(dest),
        Sharding(samples_per_shard, size, seed, encoding),
        salvage=salvage,
        channels=GRAY_CHANNELS if gray else RGB_CHANNELS,
    )


@app.command(cls=at_cluster("url", "out"))
def index(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="A folder of WebDataset tars, one tar, or a pattern like `s3://b/x/00{000..123}.tar`."
        ),
    ],
    out: Annotated[
        str, typer.Option(help="URL for indexes and manifest; default: beside the tars.", show_default=False)
    ] = "",
    *,
    deep: Annotated[
        bool, typer.Option("--deep", help="Decode every image, and skip those that do not decode.")
    ] = False,
    gray: AsGray = False,
    bands: BandCount = None,
    bits: BandBits = None,
    salvage: Salvage = False,
) -> None:
    """Make a data set from tars that were made elsewhere, without rewriting them: indexes and a manifest.

    Each tar is read once, in parallel Ray tasks. A tar that ends early or has a damaged header is reported with the
    offset. If it is interrupted, the same command resumes it.
    """
    from jobs.data.datasets import index_and_say
    from pipeline.image.channels import GRAY_CHANNELS, RGB_PIXELS, PixelKind
    from pipeline.image.photo import Encoding

    encoding = Encoding(bands=_given_bands(bands, bits, gray=gray))
    pixels = encoding.bands or (PixelKind(GRAY_CHANNELS) if gray else RGB_PIXELS)
    index_and_say(open_session(), url, out and normal(out), deep=deep, salvage=salvage, pixels=pixels)


@app.command(cls=at_cluster("url"))
def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of a data set.")],
    deep: Annotated[bool, typer.Option("--deep", help="Also decode every image.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a data set and list each fault: shard, key, offset, and what is wrong.

    Checks sizes, ETags, indexes, tar headers, labels and the CRC32C of every image. Exit code 1 if there is a fault.
    """
    from jobs.data.datasets import verify_and_say

    verify_and_say(open_session(), normal(url), deep=deep, as_json=as_json)


@app.command(cls=at_cluster("url"))
def stats(
    url: Annotated[str, typer.Argument(metavar="URL", help="URL of a data set.")],
    samples: Annotated[
        int, typer.Option(min=0, help="Most images to read, equally far apart in the data set; 0: all.")
    ] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Measure mean and deviation of a data set's pixels, each channel for itself, of pixels from 0 to 1.

    Every image counts the same. `shard` and `index` measure them too, and write them into the manifest; this command
    writes nothing. A run takes them from the manifest, or from the fields image_mean and image_std of its recipe.
    """
    from jobs.data.datasets import measure_and_say

    measure_and_say(open_session(), normal(url), samples=samples, as_json=as_json)


@app.command(cls=at_store("target"))
def inspect(
    target: Annotated[str, typer.Argument(metavar="RECIPE_OR_DATASET", help="A recipe, or the URL of a data set.")],
    overrides: Overrides = None,
    *,
    batch: Annotated[int | None, typer.Option(help="Global batch size; default: by the data set's size.")] = None,
    lanes: Annotated[int | None, typer.Option(help="Lanes; default: by the batch.")] = None,
    world: Annotated[int | None, typer.Option(help="Ranks; default: 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order; default: 0.")] = None,
    block: Annotated[int | None, typer.Option(help="Samples in a block; default: 32.")] = None,
    window: Annotated[int | None, typer.Option(help="Blocks in a lane's window; default: 64.")] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Read some index rows, to show how well labels are mixed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a recipe as it would run (parameters, FLOPs, steps, order, GETs), or a data set and how it would be read.

    FIELD=VALUE changes a recipe, and options change the plan of a data set. The design effect shows how well batches
    are mixed: 1.0 for independent draws.
    """
    given = {"batch": batch, "lanes": lanes, "world": world, "seed": seed, "block": block, "window": window}
    numbers = {name: value for name, value in given.items() if value is not None}
    session = open_session()
    if _is_dataset(target):
        from jobs.recipe.reading_plan import inspected_dataset

        if overrides:
            remedy = "give options like --batch 4096, or inspect a recipe with data=URL"
            raise UserError("argument", "must not be given with a data set", overrides[0], remedy)
        target = normal(target)
        session.storage.check(target, write=False)
        inspected = inspected_dataset(session.storage, target, numbers, labels=labels)
        print_json(inspected.to_json()) if as_json else print_pairs(inspected.lines())
        return
    from jobs.finetune.training_size import trained_size
    from jobs.recipe.plan import recipe_json, recipe_lines

    if numbers or labels:
        name = f"--{next(iter(numbers), 'labels')}"
        raise UserError("option", "must not be given with a recipe", name, "write FIELD=VALUE, like lanes=64")
    recipe = amended_recipe(target, overrides)
    size = trained_size(session.storage, recipe)
    print_json(recipe_json(recipe, size)) if as_json else print_pairs(recipe_lines(recipe, size))


@app.command(cls=at_store("dataset"))
def order(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="URL of a data set.")],
    *,
    batch: Annotated[int, typer.Option(help="Global batch size.")],
    lanes: Annotated[int, typer.Option(help="Lanes; must divide the batch.")],
    world: World = 1,
    rank: Annotated[int | None, typer.Option(help="Only this rank; default: all.", show_default=False)] = None,
    seed: OrderSeed = 0,
    step: Annotated[int, typer.Option(help="First step, from 0.")] = 0,
    steps: Annotated[int, typer.Option(help="How many steps.")] = 1,
    block: Block = 32,
    window: Window = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object per line.")] = False,
) -> None:
    """Print which samples make up each step, rank by rank, in order. Reads indexes but no images.

    With --json, each line is one object for a step and rank: step, epoch, rank, world_size, keys, shards, samples. The
    last three are lists in the order in which the rank's batch holds the samples; `samples` are their numbers in the
    data set.
    """
    from jobs.recipe.reading_plan import listed_steps
    from pipeline.load.dataset import Dataset
    from pipeline.order.sample_order import Order

    session, dataset = open_session(), normal(dataset)
    session.storage.check(dataset, write=False)
    opened = Dataset.open(session.storage, dataset)
    plan = Order(opened.samples, batch, lanes, seed, block, window)
    for row in listed_steps(opened, plan, step, steps, world_size=world, rank=rank):
        if as_json:
            say(json.dumps(row))
        else:
            say(f"step {row['step']}  epoch {row['epoch']}  rank {row['rank']}  " + " ".join(row["keys"]))


def _given_bands(bands: int | None, bits: int | None, *, gray: bool) -> PixelKind | None:
    """What images have to hold by these options; None for photographs."""
    from pipeline.image.channels import PHOTOGRAPH_BITS, PixelKind

    if bands is None:
        if bits is not None:
            raise UserError("--bits", "must be given with --bands", bits, "add --bands 1 for gray images")
        return None
    if gray:
        remedy = "give --bands 1 --bits 16 for gray images of 16 bits"
        raise UserError("--gray", "must not be given with --bands", f"--bands {bands}", remedy)
    return PixelKind(bands, PHOTOGRAPH_BITS if bits is None else bits)


def _is_dataset(target: str) -> bool:
    """Whether `target` is a path or URL of a data set; a name or a .toml file is a recipe."""
    if target.endswith(".toml"):
        return False
    if "/" in target or not Path(target).is_dir():
        return "/" in target
    from jobs.recipe.named_recipes import recipe_names

    return target not in recipe_names()
