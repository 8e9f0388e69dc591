"""What a checkpoint's commit says of where it came from, and whether this code and data can resume it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version

from jobs.checkpoint.commit import Commit
from jobs.errors import CheckpointError
from jobs.run.own_code import git_commit
from pipeline.order.sample_order import ORDER_VERSION


def check_resumable(commit: Commit, dataset_digest: str) -> None:
    """Refuse to resume a checkpoint whose steps would be dealt other samples from here on.

    Args:
        commit: Of the checkpoint.
        dataset_digest: Of the data set that is there.

    Raises:
        CheckpointError: The order or the data set is another.
    """
    if commit.order_version != ORDER_VERSION:
        remedy = "resume with the version of convmae-pretrain that began the run"
        raise CheckpointError("order_version", f"must be {ORDER_VERSION}", commit.order_version, remedy)
    if commit.dataset_digest != dataset_digest:
        rule = f"must be the data set that the run began with ({commit.dataset_digest[:12]})"
        raise CheckpointError("data", rule, dataset_digest[:12], "restore it, or start a new run")


def software_versions() -> Mapping[str, str]:
    """Versions that a checkpoint is made with."""
    packages = ("convmae-pretrain", "torch", "deepspeed", "ray", "webdataset")
    git = git_commit(os.environ)
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        **({"git": git} if git else {}),
    }
