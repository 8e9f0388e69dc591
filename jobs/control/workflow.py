"""The steps of the main job as a person follows them: train, watch, keep the results."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from jobs.cluster import submission
from jobs.cluster.session import Session
from jobs.control import driver
from jobs.control.finish import finish
from jobs.control.lease import claim_run, sole_driver
from jobs.control.micro_batch_task import with_micro_batch
from jobs.control.run_plan import RunPlan, check_folders
from jobs.control.unreported_end import end_noted, note_end
from jobs.errors import ClusterError, RunFailedError
from jobs.run.directory import FINAL_STATES, RunDirectory
from jobs.run.patience import persevere
from jobs.terminal import print_json, progress_bar, say, status_text


def train_here(session: Session, plan: RunPlan) -> None:
    """Train in this process's foreground, then write the results.

    Raises:
        RunFailedError: If the run had to be given up.
    """
    persevere(session.connect, ClusterError, plan.patience_seconds)
    with sole_driver(plan.run, lambda other: say(f"is {other} alive? watching its lease")) as lease:
        check_folders(plan, lease)
        plan = with_micro_batch(plan)
        claimed = claim_run(plan, is_sole_driver=True)
        if claimed == "finished":
            say_finished(session, plan.run)
            return
        say(f"{'begins' if claimed == 'new' else 'resumes'}: {plan.run.url}")
        if plan.probe_note:
            say(plan.probe_note)
        with end_noted(plan.run, session.environ), progress_bar(plan.run.name) as show:
            outcome = driver.train(
                session, plan, lease, lambda now: show(now["step"], now["total_steps"], status_text(now))
            )
        if outcome != "finished":
            say(f"{plan.run.name}: {outcome}; the same command resumes it from its checkpoint")
            return
        for line in finish(plan.run):
            say(line)


def train_supervised(session: Session, plan: RunPlan) -> None:
    """Become the supervisor of the run, which is what a submitted job runs: it starts a killed driver again.

    Returns only where the run is finished.
    """
    claimed = claim_run(plan)
    if claimed == "finished":
        say_finished(session, plan.run)
        return
    say(f"supervised ({'a new run' if claimed == 'new' else 'resumes'}): {plan.run.url}")
    sys.stdout.flush()
    # In place of this process, which has imported what only a driver needs: the supervisor must outlive all others.
    os.execv(sys.executable, submission.supervisor_command(sys.executable, plan.run, plan.trace_url))


def train_as_job(session: Session, plan: RunPlan, *, follow: bool, as_json: bool = False) -> None:
    """Submit the run to the cluster, and show its progress if asked to.

    Args:
        session: Says which cluster.
        plan: The run.
        follow: Return when its job has ended.
        as_json: Print one JSON object, of what was begun or, with `follow`, of what became of it; progress goes to
            standard error.

    Raises:
        RunFailedError: If it was followed and ended badly.
    """
    submission.job_client(session)  # a cluster that does not answer is found before the run is claimed
    claimed = claim_run(plan)
    job = "" if claimed == "finished" else submission.submit(session, plan.run, plan.trace_url)
    begun = {"run": plan.run.name, "url": plan.run.url, "job": job, "begins": claimed}
    if as_json:
        if job and follow:
            follow_job(session, plan.run, job, sys.stderr)
        print_json(begun | (outcome(plan.run.read_heartbeat()) if follow else {}))
    elif not job:
        say_finished(session, plan.run)
    else:
        say(f"submitted {job} ({'a new run' if claimed == 'new' else 'resumes'}): {plan.run.url}")
        if plan.probe_note:
            say(plan.probe_note)
        if follow:
            say_outcome(plan.run, follow_job(session, plan.run, job))
        else:
            word = session.word_for(plan.run)
            say(f"next: `convmae status {word}`, `convmae logs -f {word}`")


def follow_job(session: Session, run: RunDirectory, job: str, stream: TextIO | None = None) -> Mapping[str, Any]:
    """Show a submitted run's progress until its job ends; returns its last heartbeat.

    Args:
        session: Says which cluster.
        run: Which run.
        job: Its job's submission id.
        stream: Where to show it; default: standard output.

    Raises:
        RunFailedError: If it ended badly; quotes the error that it printed.
    """
    client = submission.job_client(session)
    with progress_bar(run.name, stream or sys.stdout) as show:
        while (state := submission.job_state(client, job)) not in submission.ENDED_JOB_STATES:
            now = run.read_heartbeat()
            if now and now["state"] not in FINAL_STATES:
                show(now["step"], now["total_steps"], status_text(now))
            time.sleep(1.0)
        now = run.read_heartbeat()
        if now:
            show(now["step"], now["total_steps"], status_text(now))
    return end_of_job(session, run, job, state)


def end_of_job(session: Session, run: RunDirectory, job: str, state: str) -> Mapping[str, Any]:
    """What an ended job left: the run's last heartbeat.

    Args:
        session: Says which cluster.
        run: The job's run.
        job: Its submission id.
        state: In which it ended, as `submission.job_state` gives it.

    Raises:
        RunFailedError: It ended badly; quotes the error that it printed.
    """
    if state == "LOST":
        raise RunFailedError(f"the Ray head died, and job {job} with it; the same command resumes {run.name}")
    if state != "SUCCEEDED":
        reason = _last_word(session, run, submission.job_client(session).get_job_info(job).message)
        note_end(run, 0.0, reason, session.environ)  # a job that Ray could not start has reported nothing
        raise RunFailedError(f"job {job} {state.lower()}: {reason}")
    return run.read_heartbeat()


def _last_word(session: Session, run: RunDirectory, message: str | None) -> str:
    """Why a job ended, in its own words: its last error, or else its last line; of one that never ran in Ray's."""
    pieces = submission.log_pieces(session, run, submission.newest_job(session, run), follow=False)
    lines = "".join(pieces).strip().splitlines() or (message or "it printed nothing").strip().splitlines()
    return next((line for line in reversed(lines) if line.startswith(("failed: ", "error: "))), lines[-1])


def outcome(now: Mapping[str, Any]) -> dict[str, Any]:
    """How far a run came, of its heartbeat."""
    return {key: now[key] for key in ("state", "step", "total_steps")}


def say_outcome(run: RunDirectory, now: Mapping[str, Any]) -> None:
    """Say what a followed run came to."""
    say(f"{run.name}: {now['state']} at step {now['step']} of {now['total_steps']}")


def say_finished(session: Session, run: RunDirectory) -> None:
    """Say that there is nothing left to do, and what one can do instead."""
    say(f"{run.name} is finished; `convmae report {session.word_for(run)}` shows it, another --run name starts anew")
