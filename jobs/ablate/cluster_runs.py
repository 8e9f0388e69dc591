"""Runs of an ablation on a cluster: ordinary runs, submitted as `convmae submit` does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.ablate.room import Occupant, has_room, seen_now
from jobs.ablate.schedule import FINISHED
from jobs.ablate.spec import Trial
from jobs.cluster import submission
from jobs.cluster.session import Session
from jobs.control.lease import claim_run, is_committed_to_the_end, is_live
from jobs.control.run_plan import RunPlan
from jobs.control.workflow import end_of_job
from jobs.errors import RunFailedError
from jobs.run.directory import FINAL_STATES, REPORT_NAME, STOP_REQUEST_NAME, RunDirectory
from jobs.terminal import ShowProgress
from pipeline.store.storage import Storage

ELSEWHERE = "elsewhere"
"""In place of a job: the run is alive, but no job of this cluster works on it."""


@dataclass(frozen=True)
class ClusterRuns:
    """The runs, by the plans of their trials; see `schedule.Runs`."""

    session: Session
    plans: Mapping[Trial, RunPlan]
    folder: str
    """Of the ablation."""

    def is_finished(self, trial: Trial) -> bool:
        """By its last commit and its report, as `convmae submit` sees it."""
        plan = self.plans[trial]
        is_trained = plan.run.exists() and is_committed_to_the_end(plan)
        return is_trained and plan.run.storage.exists(plan.run.path(REPORT_NAME))

    def job_of(self, trial: Trial) -> str:
        """Its newest job, if that has not ended; ELSEWHERE if it is alive without one."""
        run = self.plans[trial].run
        if not run.exists():
            return ""
        return live_job(self.session, run) or (ELSEWHERE if is_live(run) else "")

    def begin(self, trial: Trial) -> str:
        """Claim it and submit its job; empty if it turns out to be finished."""
        plan = self.plans[trial]
        if claim_run(plan) == "finished":
            return ""
        return submission.submit(self.session, plan.run)

    def end_of(self, trial: Trial, job: str) -> str:
        """What its job, or else its heartbeat, says."""
        run = self.plans[trial].run
        if job == ELSEWHERE:
            state = run.read_heartbeat().get("state", "")
            return _end_text(run, state) if state in FINAL_STATES else "" if is_live(run) else "interrupted"
        state = submission.job_state(submission.job_client(self.session), job)
        if state not in submission.ENDED_JOB_STATES:
            return ""
        try:
            now = end_of_job(self.session, run, job, state)
        except RunFailedError as error:
            return str(error)
        return _end_text(run, str(now.get("state", "")) or "its job ended without a word")

    def has_room(self, trial: Trial, running: Sequence[Trial]) -> bool:
        """By what the nodes offer now."""
        ours = [Occupant(one.recipe, _workers(self.plans[one].run)) for one in running]
        return has_room(trial.recipe, seen_now(), ours)

    def is_stopped(self) -> bool:
        """Whether `--stop` was typed since this command began."""
        return self.session.storage.exists(Storage.join(self.folder, STOP_REQUEST_NAME))

    def show(self, done: int, running: Sequence[Trial], show: ShowProgress) -> None:
        """Show how far the runs have come."""
        beats = ((trial, self.plans[trial].run.read_heartbeat()) for trial in running)
        texts = (f"{trial.run_name} {now['step']}/{now['total_steps']}" for trial, now in beats if now)
        show(done, len(self.plans), " · ".join(texts) or "runs start")


def live_job(session: Session, run: RunDirectory) -> str:
    """Submission id of the run's newest job; empty if that has ended, or there is none."""
    job = submission.newest_job(session, run)
    is_over = not job or submission.job_state(submission.job_client(session), job) in submission.ENDED_JOB_STATES
    return "" if is_over else job


def stop_all(session: Session, runs: Sequence[RunDirectory], folder: str) -> list[RunDirectory]:
    """Ask all runs that are at work to save and end, and the command that submits them to submit no more.

    A job whose run has not begun has nothing to save, and is ended by Ray.

    Returns:
        The runs that were asked.
    """
    session.storage.write(Storage.join(folder, STOP_REQUEST_NAME), b"{}\n")
    asked = []
    for run in runs:
        if not run.exists():
            continue
        if is_live(run):
            run.write_stop_request()
        elif job := live_job(session, run):
            submission.job_client(session).stop_job(job)
        else:
            continue
        asked.append(run)
    while any(_is_at_work(session, run) for run in asked):
        time.sleep(1.0)
    return asked


def _is_at_work(session: Session, run: RunDirectory) -> bool:
    state = run.read_heartbeat().get("state", "")
    return state not in FINAL_STATES and bool(live_job(session, run) or is_live(run))


def _workers(run: RunDirectory) -> float:
    now = run.read_heartbeat()
    return 0.0 if now.get("state") in FINAL_STATES else float(now.get("world_size") or 0)


def _end_text(run: RunDirectory, state: str) -> str:
    if state == FINISHED:
        return FINISHED
    reasons = [event.get("reason", "") for event in run.read_events() if event["kind"] == state]
    at = f"{state} at step {run.read_heartbeat().get('step', 0)}"
    return f"{at}: {reasons[-1]}" if reasons and reasons[-1] else at
