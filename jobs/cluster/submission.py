"""Runs as Ray jobs: submitted, followed, their logs read. A run outlives its jobs, which are named `<run>-a<N>`."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from jobs.cluster import job_store
from jobs.cluster.address import http_proxy, refusal
from jobs.cluster.ray_internals.core import dashboard_address
from jobs.cluster.session import Session
from jobs.errors import ClusterError, RunError
from jobs.run.directory import RunDirectory
from jobs.run.own_code import VARIABLE, git_commit, module_command

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# Ray kills a stopped job's driver after this long; a checkpoint is saved meanwhile.
STOP_WAIT_SECONDS = 600
ENDED_JOB_STATES = frozenset({"SUCCEEDED", "FAILED", "STOPPED", "LOST"})
NO_AGENT = "No available agent"
"""What Ray's head answers to jobs before the first node's agent has reported, and when none does any more."""
AGENT_SECONDS = 60.0
TAIL_SECONDS = 1.0


def submit(session: Session, run: RunDirectory, trace_url: str = "") -> str:
    """Start a claimed run as a Ray job; returns the job's submission id.

    The job reads its recipe from the run directory, so nothing but URLs is in its command line.

    Raises:
        ClusterError: If the cluster does not accept it.
        StorageError: If there are no keys for the store.
    """
    client = job_client(session)
    number = max((_number(job, run.name) for job in _jobs(client, run.name)), default=0) + 1
    python = sys.executable if session.is_local else "python"
    job = {
        "entrypoint": shlex.join(supervisor_command(python, run, trace_url)),
        "submission_id": f"{run.name}-a{number}",
        "metadata": {"run": run.name, "run_url": run.url},
        "runtime_env": {
            **session.code(),
            "env_vars": {
                "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS),
                VARIABLE: git_commit(session.environ),
                **job_store.send(session, client),
            },
        },
    }
    return hand_over(client, job, session.cluster.text)


def supervisor_command(python: str, run: RunDirectory, trace_url: str) -> list[str]:
    """The command that drives a claimed run, and restarts a driver that was killed."""
    return module_command(python, "jobs.control.supervisor", run.url, *(["--trace", trace_url] if trace_url else []))


def hand_over(client: Any, job: dict[str, Any], address: str, patience_seconds: float = AGENT_SECONDS) -> str:
    """Give Ray a job, waiting for a cluster that has only just started; returns its submission id.

    Args:
        client: The cluster's job client.
        job: Arguments of `submit_job`.
        address: Of the cluster, for messages.
        patience_seconds: How long to retry while no node of the cluster is ready for jobs.

    Raises:
        ClusterError: If the cluster does not accept it.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return str(client.submit_job(**job))
        except (RuntimeError, OSError) as error:
            if NO_AGENT in str(error) and time.monotonic() < deadline:
                continue  # Ray itself has waited for seconds before this answer
            lines = str(error).rstrip(" .").splitlines() or [type(error).__name__]
            remedy = "look at the cluster with `convmae doctor`; the same command submits again"
            raise ClusterError("RAY_ADDRESS", f"must accept the job ({lines[-1]})", address, remedy) from error


def job_state(client: JobSubmissionClient, submission_id: str) -> str:
    """Ray's state of a job (PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED), UNREACHABLE, or LOST with its Ray head."""
    try:
        return str(client.get_job_status(submission_id).value)
    except OSError:  # what requests raises while nothing listens
        return "UNREACHABLE"
    except RuntimeError:  # a head that was restarted does not know the job
        return "LOST"


def newest_job(session: Session, run: RunDirectory) -> str:
    """Submission id of the run's newest job on this cluster; empty if there is none."""
    jobs = [job for job in _jobs(job_client(session), run.name) if (job.metadata or {}).get("run_url") == run.url]
    return str(max(jobs, key=lambda job: _number(job, run.name)).submission_id) if jobs else ""


def log_pieces(session: Session, run: RunDirectory, submission_id: str, *, follow: bool) -> Iterator[str]:
    """What a job of the run printed, in pieces.

    Args:
        session: Names the cluster.
        run: The job's run.
        submission_id: From `newest_job`.
        follow: Continue until the job ends.

    Raises:
        RunError: If the run was never submitted as a job to this cluster.
    """
    client = job_client(session)
    if not submission_id:
        remedy = f"it ran in the foreground, or on another cluster; `convmae status {run.name}` shows its events"
        raise RunError("run", "must have been submitted to this cluster", run.name, remedy)
    if not follow:
        yield str(client.get_job_logs(submission_id))
        return
    pieces = tail_log(client, submission_id)

    async def next_piece() -> str | None:
        return await anext(pieces, None)

    with asyncio.Runner() as runner:
        while (piece := runner.run(next_piece())) is not None:
            yield piece


async def tail_log(client: Any, submission_id: str) -> AsyncIterator[str]:
    """What a job prints, in pieces, until it ends.

    Ray's own way is a WebSocket, which supports no proxy, and which few proxies let through; behind one, the log is
    polled.
    """
    if not http_proxy(dashboard_address(client)):
        async for piece in client.tail_job_logs(submission_id):
            yield piece
        return
    shown, state = 0, ""
    while state not in ENDED_JOB_STATES:
        state = job_state(client, submission_id)
        text = str(client.get_job_logs(submission_id))
        if text[shown:]:
            yield text[shown:]
        shown = len(text)
        await asyncio.sleep(TAIL_SECONDS)


def job_client(session: Session) -> JobSubmissionClient:
    """A client of the session's cluster.

    Raises:
        ClusterError: If there is no cluster, or it does not answer.
    """
    address = session.stack.dashboard_url if session.is_local and session.stack else session.cluster.text
    session.cluster.check_answers()
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    session.quiet_ray()
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise refusal(session.cluster.text, error) from error


def _jobs(client: Any, run: str) -> list[JobDetails]:
    return [job for job in client.list_jobs() if _number(job, run)]


def _number(job: JobDetails, run: str) -> int:
    """N of a submission id `<run>-a<N>`; 0 if it is another run's."""
    match = re.fullmatch(re.escape(run) + r"-a(\d+)", job.submission_id or "")
    return int(match[1]) if match else 0
