"""A profile of a live run, for whoever asks: the request, and the wait for what comes of it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from jobs.control.lease import is_live
from jobs.errors import RunError, RunFailedError
from jobs.run.directory import FINAL_STATES, RunDirectory
from jobs.run.profile_request import ProfileRequest

LOOK_SECONDS = 1.0


def profiled(
    run: RunDirectory, rank: int, steps: int, *, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Have a rank of a live run profiled; returns the event that says where the result is.

    Args:
        run: Its directory.
        rank: Which one.
        steps: For how many.
        sleep: Waits between two looks.

    Raises:
        RunError: The run does not train, or has no such rank, or the steps are none or too many.
        RunFailedError: The profile could not be made, or the run ended before.
    """
    heartbeat = run.read_heartbeat()
    if not is_live(run):
        state = heartbeat.get("state", "submitted")
        remedy = f"start it with `convmae resume {run.name}`"
        raise RunError("run", "must be running to be profiled", f"{run.name} ({state})", remedy)
    request = ProfileRequest(rank, steps, uuid.uuid4().hex)
    request.check(int(heartbeat.get("world_size") or 0))
    run.write_profile_request(request)
    while True:
        ended = run.read_heartbeat()["state"] in FINAL_STATES  # before the events: none comes after it
        for event in run.read_events():
            if event.get("request") != request.key:
                continue
            if event["kind"] == "profile-failed":
                raise RunFailedError(f"{run.name} was not profiled: {event['reason']}")
            return event
        if ended:
            raise RunFailedError(f"{run.name} ended before rank {rank} was profiled")
        sleep(LOOK_SECONDS)
