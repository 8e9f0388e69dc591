"""The command line of both examples."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from schedule import Schedule
from torch import Tensor, distributed, nn
from training import Job, Ranks, Sample, load_trained, train

from model import ModelConfigError
from pipeline.errors import UserError

RESULT = "result.json"


class PlaceError(UserError):
    """A folder that cannot be written to."""


def arguments(description: str, schedule: str, splits: tuple[str, str], given: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Args:
        description: Of the example.
        schedule: Name of the default one.
        splits: Default names of the data's parts for training and testing.
        given: Words after the program's name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the data")
    add("--train-split", default=splits[0], help="part that is trained on (%(default)s)")
    add("--val-split", default=splits[1], help="part that is tested on (%(default)s)")
    add("--out", type=Path, required=True, help="folder of checkpoints and figures; a training in it is resumed")
    add("--weights", type=Path, help="of `convmae export --format backbone` or `convmae consolidate`; else random")
    add("--schedule", type=Path, default=Path(__file__).parent / "schedules" / schedule, help="TOML (%(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the schedule")
    add("--seed", type=int, default=0)
    add("--micro-batch", type=_positive, default=1, help="images that a process computes at once (%(default)s)")
    add("--threads", type=_positive, default=4, help="that read images, of each process (%(default)s)")
    add("--save-every-steps", type=_positive, default=1000, help="between checkpoints (%(default)s)")
    add("--test-only", action="store_true", help="test the last checkpoint in --out")
    return parser.parse_args(given)


def exit_code(work: Callable[[], None]) -> int:
    """Do the work; what the user has to correct becomes one line and 2."""
    try:
        work()
    except (UserError, ModelConfigError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


def trained(
    model: nn.Module,
    given: argparse.Namespace,
    ranks: Ranks,
    *,
    schedule: Schedule,
    size: int,
    load: Callable[[int, int], Sample],
    losses: Callable[[nn.Module, list[Sample]], dict[str, Tensor]],
    identity: Mapping[str, Any],
) -> int:
    """Train as the command line says, unless it asks for a test alone; returns the step of the weights in the model.

    Args:
        model: On the device.
        given: As of `arguments`.
        ranks: Which process this is.
        schedule: As read.
        size: Samples of the data set.
        load: As `Job.load`.
        losses: As `Job.losses`.
        identity: As `Job.identity`.

    Raises:
        TrainingError: As `training.train` and `training.load_trained`.
        PlaceError: There can be no such folder.
    """
    _make_folder(given.out)
    if not given.test_only:
        job = Job(
            schedule=schedule,
            seed=given.seed,
            out=given.out,
            size=size,
            load=load,
            losses=losses,
            micro_batch=given.micro_batch,
            threads=given.threads,
            save_every_steps=given.save_every_steps,
            identity=identity,
        )
        train(model, job, ranks, print)
    return load_trained(model, given.out, identity)


def _make_folder(out: Path) -> None:
    """Create the folder of a training.

    Raises:
        PlaceError: If that is impossible.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"must be a folder that can be made ({type(error).__name__})"
        raise PlaceError("--out", rule, str(out), "choose another") from None


def write_result(out: Path, step: int, figures: Mapping[str, Any]) -> None:
    """Keep what was measured beside the checkpoint."""
    (out / RESULT).write_text(json.dumps({"step": step, **figures}, indent=1) + "\n")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
