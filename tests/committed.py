"""A small checkpoint of any files."""

from __future__ import annotations

from pathlib import Path

from zero_material import upload_files

from jobs.checkpoint import checkpoint
from jobs.checkpoint.commit import Commit
from jobs.run.directory import RunDirectory


def save(run: RunDirectory, local: Path, step: int, milestone: bool = False) -> Commit:
    """Upload the files of a folder and commit them."""
    commit = Commit(
        step=step,
        epoch=step // 10,
        world_size=2,
        zero_stage=1,
        precision="fp32",
        recipe_digest="a" * 64,
        dataset_digest="b" * 64,
        order_version=1,
        seed=0,
        attempt=1,
        created_at_seconds=1.5,
        milestone=milestone,
        counters={"images_total": 64.0 * step},
        versions={"torch": "2"},
        files=tuple(upload_files(run, step, local)),
    )
    checkpoint.write_commit(run, commit)
    return commit
