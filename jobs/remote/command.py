"""A command that runs on the cluster as a Ray job, and is shown and interrupted where it was typed."""

from __future__ import annotations

import asyncio
import json
import queue
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from jobs.cluster import job_store
from jobs.cluster.session import VERBOSE_VARIABLE, Session
from jobs.cluster.submission import ENDED_JOB_STATES, STOP_WAIT_SECONDS, hand_over, job_client, job_state, tail_log
from jobs.errors import RunFailedError
from jobs.remote.frames import CALLER_VARIABLE, Frame, Replay
from jobs.run import own_code, roots
from jobs.run.own_code import module_command
from jobs.terminal import whole_lines, write_line
from pipeline.errors import UserError
from pipeline.store.json_text import parsed_object

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RESOURCES_VARIABLE = "CONVMAE_COMMAND_RESOURCES"
"""Resources for which such a job asks Ray, as a JSON object; unset: none, and it runs on the head."""
RETRY_SECONDS = 2.0
"""Before the log is requested again after the connection broke."""
UNREACHABLE_SECONDS = 20.0
"""Silence of a cluster after which the user is told that the command waits for it."""
TAIL_LINES = 15
"""Lines of others in the log, which are shown if a command ends without reporting its exit code."""


def run_there(
    session: Session, arguments: Sequence[str], *, files: Mapping[str, str] | None = None, run_root: str = ""
) -> int:
    """Run `convmae ARGUMENTS` on the session's cluster; returns its exit code.

    Output and progress are shown on this process's streams. Ctrl-C stops the job as it would have stopped the command;
    a second one ends only this process.

    Args:
        session: Names the cluster.
        arguments: The command's; paths in them are those of the cluster, or names of `files`.
        files: Small files to send along, by name.
        run_root: Holds the runs, for a command that is not given one.

    Raises:
        ClusterError: The cluster does not answer, or does not accept the job.
        RunFailedError: The job ended without reporting the command's exit code: it was killed, or the head died.
    """
    client = job_client(session)
    job = job_of_command(session, arguments, files or {}, run_root)
    job["runtime_env"]["env_vars"] |= job_store.send(session, client)
    job_id = hand_over(client, job, session.cluster.text)
    with Replay(sys.stdout, sys.stderr) as replay:
        foreign = _follow(client, job_id, replay, show_foreign=session.is_verbose)
    if replay.exit_code is not None:
        return replay.exit_code
    state = job_state(client, job_id)
    for line in foreign:
        write_line(sys.stderr, line)
    raise RunFailedError(f"job {job_id} ended without an exit code ({state.lower()}); the same command resumes it")


def job_of_command(
    session: Session, arguments: Sequence[str], files: Mapping[str, str], run_root: str
) -> dict[str, Any]:
    """The job that Ray is asked to run."""
    terminals = [name for name, stream in (("out", sys.stdout), ("err", sys.stderr)) if stream.isatty()]
    variables = {
        CALLER_VARIABLE: json.dumps({"terminals": terminals, "files": dict(files)}),
        "COLUMNS": str(shutil.get_terminal_size().columns),
        "RAY_JOB_STOP_SIGNAL": "SIGINT",  # like Ctrl-C; for SIGTERM, Ray has its own handler, which exits
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS),
        own_code.VARIABLE: own_code.git_commit(session.environ),
        **({roots.VARIABLE: run_root} if run_root else {}),
        **({VERBOSE_VARIABLE: "1"} if session.is_verbose else {}),
    }
    return {
        "entrypoint": shlex.join(module_command("python", "jobs.cli.command_job", *arguments)),
        "submission_id": f"command-{arguments[0]}-{secrets.token_hex(4)}",
        "metadata": {"command": arguments[0]},
        "entrypoint_resources": entrypoint_resources(session.environ.get(RESOURCES_VARIABLE, "")),
        "runtime_env": {**session.code(), "env_vars": variables},
    }


def entrypoint_resources(text: str) -> dict[str, float]:
    """The custom resources of a cluster that the job of a command asks for.

    Args:
        text: A JSON object; empty for none.

    Raises:
        UserError: It is not such an object.
    """
    try:
        wanted = parsed_object(text) if text else {}
        return {str(name): float(amount) for name, amount in wanted.items()}
    except (ValueError, TypeError, OverflowError):
        remedy = """write for example {"ingest": 0.01}"""
        raise UserError(RESOURCES_VARIABLE, "must be a JSON object of names and amounts", text, remedy) from None


def _follow(client: JobSubmissionClient, job_id: str, replay: Replay, *, show_foreign: bool) -> deque[str]:
    """Show a job's frames until it has ended; returns the last lines that others wrote into its log."""
    foreign: deque[str] = deque(maxlen=TAIL_LINES)
    with _Interrupts(client, job_id, sys.stderr) as interrupts:
        for line in _LogLines(client, job_id, interrupts):
            frame = Frame.of(line)
            if frame:
                replay.show(frame)
            elif line.strip():
                foreign.append(line)
                if show_foreign:
                    write_line(sys.stderr, line)
    return foreign


class _Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a stop of the job; the second one ends this process.

    The next line is awaited inside `wait`, so that Python delivers the signal there.
    """

    def __init__(self, client: JobSubmissionClient, job_id: str, stream: TextIO) -> None:
        self._client, self._job_id, self._stream = client, job_id, stream
        self._asked = False

    def __enter__(self) -> _Interrupts:
        self._previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def wait(self, get: Callable[[], Any]) -> Any:
        """The result of `get`, once it returns."""
        while True:
            try:
                return get()
            except KeyboardInterrupt:
                if self._asked:
                    write_line(self._stream, f"job {self._job_id} is still stopping")
                    raise
                self._asked = True
                threading.Thread(target=self._stop, daemon=True).start()

    def _stop(self) -> None:
        deadline = time.monotonic() + STOP_WAIT_SECONDS
        while time.monotonic() < deadline:
            try:
                self._client.stop_job(self._job_id)
            except (OSError, RuntimeError):  # unreachable for a moment, or already ended
                if job_state(self._client, self._job_id) in ENDED_JOB_STATES:
                    return
                time.sleep(RETRY_SECONDS)
            else:
                return


class _LogLines:
    """The lines of a job's log until the job has ended; after a broken connection, from the beginning again.

    Owns: a thread that reads. Frames have numbers, by which lines that come again are recognized.
    """

    def __init__(self, client: JobSubmissionClient, job_id: str, interrupts: _Interrupts) -> None:
        self._client, self._job_id, self._interrupts = client, job_id, interrupts
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="job-log", daemon=True).start()

    def __iter__(self) -> Any:
        return whole_lines(iter(lambda: self._interrupts.wait(self._pieces.get), None))

    def _read(self) -> None:
        try:
            self._read_to_the_end()
        finally:
            self._pieces.put(None)

    def _read_to_the_end(self) -> None:
        silent_since, warned = time.monotonic(), False
        while True:
            try:
                asyncio.run(self._tail())
                silent_since = time.monotonic()
            except Exception:  # however the connection broke: the job's state decides
                pass
            state = job_state(self._client, self._job_id)
            if state in ENDED_JOB_STATES:
                return
            if state != "UNREACHABLE":
                silent_since, warned = time.monotonic(), False
            elif time.monotonic() - silent_since > UNREACHABLE_SECONDS and not warned:
                write_line(sys.stderr, "the cluster is unreachable; waiting for it, while the job continues there")
                warned = True
            self._pieces.put("\n")  # ends an incomplete line
            time.sleep(RETRY_SECONDS)

    async def _tail(self) -> None:
        async for piece in tail_log(self._client, self._job_id):
            self._pieces.put(piece)
