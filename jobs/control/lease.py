"""Who may drive a run: one driver at a time, under a lease, and only with the run's own recipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

from jobs.checkpoint import checkpoint
from jobs.checkpoint.checkpoint import CLAIMS
from jobs.control.run_plan import RunPlan
from jobs.errors import OvertakenError, RunError
from jobs.monitor.run_memory import FLUSH_INTERVAL_SECONDS
from jobs.run.directory import FINAL_STATES, REPORT_NAME, RunDirectory
from pipeline.errors import LeaseHeldError
from pipeline.store.lease import BEAT_SECONDS, Lease, current_lease, hold_lease


def is_live(run: RunDirectory) -> bool:
    """Whether another driver works on the run: its heartbeat moves. Takes seconds only if a run was cut off."""
    first = run.read_heartbeat()
    if not first or first["state"] in FINAL_STATES:
        return False
    deadline = time.monotonic() + 3 * FLUSH_INTERVAL_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if run.read_heartbeat().get("updated_at_seconds") != first["updated_at_seconds"]:
            return True
    return False


@contextlib.contextmanager
def sole_driver(
    run: RunDirectory, on_wait: Callable[[str], None], *, beat_seconds: float = BEAT_SECONDS
) -> Iterator[Lease]:
    """Be the only driver of `run` while the context is open.

    A driver that died in this PID namespace is known to be dead at once, one elsewhere, another container on this
    machine included, when its lease was not renewed for pipeline.store.lease.DEAD_SECONDS.

    Args:
        run: Whose directory will be written to.
        on_wait: Is given who is watched, where it must be seen whether a driver still lives.
        beat_seconds: Between two beats of this driver.

    Raises:
        RunError: Another one lives; names it, and the age of its lease.
    """
    try:
        with hold_lease(
            run.storage,
            run.path(CLAIMS),
            "drives the run",
            on_wait=on_wait,
            keeps_number=True,
            beat_seconds=beat_seconds,
        ) as lease:
            yield lease
    except LeaseHeldError as error:
        raise RunError("run", error.rule, run.name, _ask_the_other(run)) from None


def _ask_the_other(run: RunDirectory) -> str:
    return f"watch it with `convmae status {run.name}`, end it with `convmae stop {run.name}`"


def claim_run(plan: RunPlan, *, is_sole_driver: bool = False) -> Literal["new", "resumes", "finished"]:
    """Take the run's name for this recipe; a run is finished when its last step is committed and its report written.

    Args:
        plan: The run.
        is_sole_driver: Whether this process is in `sole_driver`; else it is watched for seconds whether another one is.

    Raises:
        RunError: If the name belongs to another recipe, or another driver works on the run.
    """
    run = plan.run
    if run.check_recipe(plan.recipe):
        if is_committed_to_the_end(plan) and run.storage.exists(run.path(REPORT_NAME)):
            return "finished"
        if not is_sole_driver and is_live(run):
            ruler = current_lease(run.storage, run.path(CLAIMS))
            held = f" ({ruler.text})" if ruler and not ruler.is_over else ""
            raise RunError("run", f"must not be running already{held}", run.name, _ask_the_other(run))
        run.take_stop_request()  # one that nobody read is not meant for this attempt
        with contextlib.suppress(RunError):  # nor is this, which may also be damaged
            run.take_profile_request()
    return "new" if run.claim(plan.recipe) else "resumes"


def is_committed_to_the_end(plan: RunPlan) -> bool:
    """Whether the last step of its schedule has a checkpoint."""
    steps = checkpoint.committed_steps(plan.run)
    return bool(steps) and steps[-1] >= plan.schedule.total_steps


def overtaken(run: RunDirectory, error: LeaseHeldError) -> OvertakenError:
    """The error of a driver that was silent for too long, and whose run has another one now."""
    remedy = f"this driver was silent for too long; {_ask_the_other(run)}"
    return OvertakenError("run", error.rule, run.name, remedy)
