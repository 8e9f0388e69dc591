"""`convmae consolidate`, with its output: where it runs, its progress, and its result."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from jobs.checkpoint.checkpoint import commit_url
from jobs.checkpoint.commit import Commit
from jobs.cluster.fan_out import FanOut
from jobs.cluster.session import Session
from jobs.consolidation.consolidate import consolidate, in_threads
from jobs.consolidation.file_layout import PART_BYTES
from jobs.consolidation.target import ConsolidatedWeights, Target
from jobs.consolidation.writer import ConsolidationProgress
from jobs.run.directory import RunDirectory
from jobs.run.shared_folder import Landmarks, file_landmarks, planted
from jobs.terminal import bytes_text, duration_text, progress_bar, say

CLUSTER_BYTES = 2 << 30
"""From this size, tasks on a cluster are worth their start; smaller checkpoints take seconds here."""


def needs_cluster(session: Session, commit: Commit) -> bool:
    """Whether a checkpoint is copied by tasks of a cluster."""
    return commit.bytes >= CLUSTER_BYTES and "RAY_ADDRESS" in session.environ


def consolidate_and_say(session: Session, run: RunDirectory, commit: Commit, target: Target, *, force: bool) -> None:
    """Consolidate a checkpoint, show progress, and print the result.

    Raises:
        UserError: The target exists, a file of the checkpoint is damaged, or a value does not fit.
    """
    on_cluster = needs_cluster(session, commit)
    folder = target.url(run, commit.step).rpartition("/")[0]
    with planted(run.storage, "target", folder if on_cluster else "") as there, _shown() as show:
        source = file_landmarks(run.storage, "run", run.url, commit_url(run, commit.step))
        fan_out = _on_cluster(session, (*source, *there)) if on_cluster else _in_threads(target.dtype)
        result = consolidate(
            run,
            commit.step,
            target,
            if_exists="replace" if force else "refuse",
            fan_out=fan_out,
            on_progress=show,
            on_wait=lambda holder: say(f"a lease is held by {holder}; watching for up to 30 s whether it still works"),
        )
    say(result_line(result))


def result_line(result: ConsolidatedWeights) -> str:
    """What was made, in one line."""
    size, seconds = bytes_text(result.bytes), duration_text(result.seconds)
    resumed = f", {bytes_text(result.kept_bytes)} of an earlier call" if result.kept_bytes else ""
    if len(result.files) == 1 and result.url == result.files[0].url:
        sha256 = result.files[0].sha256[:16]
        return f"step {result.step}: {result.url} ({size}{resumed}, sha256 {sha256}…) in {seconds}"
    kept = f", {result.kept} of them kept" if result.kept else ""
    return f"step {result.step}: {result.url} ({len(result.files)} files{kept}, {size}{resumed}) in {seconds}"


def progress_text(now: ConsolidationProgress, seconds: float) -> str:
    """The figures of a consolidation in one line; parts that were kept do not count towards the rate."""
    rate = now.bytes / seconds if seconds else 0.0
    fresh = now.done - now.kept
    remaining = seconds / fresh * (now.total - now.done) if fresh else None
    return f"{bytes_text(now.bytes)} · {bytes_text(rate)}/s · ETA {duration_text(remaining)}"


def _in_threads(dtype: str) -> FanOut:
    return in_threads(PART_BYTES, most=2 * (os.cpu_count() or 1), dtype=dtype)


def _on_cluster(session: Session, landmarks: Landmarks) -> FanOut:
    session.connect()
    from jobs.cluster.fan_out import fan_out

    return functools.partial(fan_out, copying=True, landmarks=landmarks)


@contextmanager
def _shown() -> Iterator[Callable[[str, ConsolidationProgress], None]]:
    """Show progress by parts, then by the names of later stages."""
    began = time.monotonic()
    with ExitStack() as bars:
        stage, draw = "", None

        def show(name: str, now: ConsolidationProgress) -> None:
            nonlocal stage, draw
            if draw is None or name != stage:
                bars.close()
                stage, draw = name, bars.enter_context(progress_bar(name))
            figures = progress_text(now, time.monotonic() - began) if name == "parts" else bytes_text(now.bytes)
            draw(now.done, now.total, figures)

        yield show
