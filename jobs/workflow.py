"""The steps of the main job as a person follows them: train, watch, keep the results."""

from __future__ import annotations

import time

from jobs import driver, submission
from jobs.driver import FINAL_STATES, RunPlan
from jobs.errors import RunFailedError
from jobs.finish import finish
from jobs.run_directory import RunDirectory
from jobs.session import Session
from jobs.terminal import progress_bar, say, status_text

ENDED_JOB_STATES = frozenset({"SUCCEEDED", "FAILED", "STOPPED", "LOST"})


def train_here(session: Session, plan: RunPlan) -> None:
    """Train in this process's foreground, then write the results.

    Raises:
        RunFailedError: If the run had to be given up.
    """
    session.connect()
    with driver.sole_driver(plan.run, lambda other: say(f"is {other} alive? watching its lease")) as claim:
        claimed = driver.claim_run(plan)
        if claimed == "finished":
            say_finished(plan.run)
            return
        say(f"{'begins' if claimed == 'new' else 'resumes'}: {plan.run.url}")
        with progress_bar(plan.run.name) as show:
            outcome = driver.train(
                session, plan, claim, lambda now: show(now["step"], now["total_steps"], status_text(now))
            )
        if outcome != "finished":
            say(f"{plan.run.name}: {outcome}; the same command resumes it from its checkpoint")
            return
        for line in finish(plan.run):
            say(line)


def train_as_job(session: Session, plan: RunPlan, *, follow: bool) -> None:
    """Submit the run to the cluster, and show its progress if asked to.

    Raises:
        RunFailedError: If it was followed and ended badly.
    """
    submission.job_client(session)  # a cluster that does not answer is found before the run is claimed
    claimed = driver.claim_run(plan)
    if claimed == "finished":
        say_finished(plan.run)
        return
    job = submission.submit(session, plan.run, plan.trace_url)
    say(f"submitted {job} ({'a new run' if claimed == 'new' else 'resumes'}): {plan.run.url}")
    if follow:
        follow_job(session, plan.run, job)
    else:
        say(f"next: `convmae status {plan.run.name}`, `convmae logs -f {plan.run.name}`")


def follow_job(session: Session, run: RunDirectory, job: str) -> None:
    """Show a submitted run's progress until its job ends.

    Raises:
        RunFailedError: If it ended badly; quotes the error that it printed.
    """
    client = submission.job_client(session)
    with progress_bar(run.name) as show:
        while (state := submission.job_state(client, job)) not in ENDED_JOB_STATES:
            now = run.read_heartbeat()
            if now and now["state"] not in FINAL_STATES:
                show(now["step"], now["total_steps"], status_text(now))
            time.sleep(1.0)
        now = run.read_heartbeat()
        if now:
            show(now["step"], now["total_steps"], status_text(now))
    if state == "LOST":
        raise RunFailedError(f"the Ray head died, and job {job} with it; the same command resumes {run.name}")
    if state != "SUCCEEDED":
        raise RunFailedError(f"job {job} {state.lower()}: {_last_word(session, run)}")
    say(f"{run.name}: {now['state']} at step {now['step']} of {now['total_steps']}")


def _last_word(session: Session, run: RunDirectory) -> str:
    """Why a job ended, in its own words: its last error, or else its last line."""
    lines = "".join(submission.log_lines(session, run, follow=False)).strip().splitlines() or ["it printed nothing"]
    return next((line for line in reversed(lines) if line.startswith(("failed: ", "error: "))), lines[-1])


def say_finished(run: RunDirectory) -> None:
    """Say that there is nothing left to do, and what one can do instead."""
    say(f"{run.name} is finished; `convmae report {run.name}` shows it, another --run name starts anew")
