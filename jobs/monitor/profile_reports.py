"""A profile that somebody asked for, as the run's monitor passes it on: from the run directory to a rank and back."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.monitor.run_memory import RunMemory
from jobs.run.profile_request import ProfileRequest


class ProfileReports(RunMemory):
    """The part of the monitor that passes on profiles. Concurrency and failure: as `RunMemory`; never blocks.

    One profile at a time: asked for, taken by its rank, then written or failed.
    """

    def ask_profile(self, request: ProfileRequest) -> None:
        """Note that a rank is to be profiled; refused where there is no such rank, or one is being profiled."""
        with self._lock:
            world_size = int(self._figures["world_size"] or 0)
            if self._profile:
                self._profile_ended(request, f"rank {self._profile.rank} is being profiled")
            elif request.rank >= world_size or self._figures["state"] != "running":
                self._profile_ended(request, f"{world_size} ranks train now, and the run is {self._figures['state']}")
            else:
                self._profile, self._profile_is_taken = request, False
                self._instructions.profile()

    def take_profile(self, rank: int) -> ProfileRequest | None:
        """What this rank is to profile, which it is given once; every rank asks after the instruction `profile`."""
        with self._lock:
            request = self._profile
            if request is None or request.rank != rank or self._profile_is_taken:
                return None
            self._profile_is_taken = True
            self._instructions.profiles()
            return request

    def profiled(self, request: ProfileRequest, *, step: int, url: str, files: Sequence[str], note: str) -> None:
        """Note a profile that was written.

        Args:
            request: What was asked for.
            step: The last one that was profiled.
            url: Folder with the files.
            files: Their names.
            note: What is missing, and why; empty where nothing is.
        """
        with self._lock:
            self._profile = None
            self._add_event(
                "profile",
                step=step,
                rank=request.rank,
                steps=request.steps,
                request=request.key,
                url=url,
                files=list(files),
                reason=note,
            )

    def profile_failed(self, request: ProfileRequest, error: str) -> None:
        """Note a profile that could not be made or written; training continues."""
        with self._lock:
            self._profile = None
            self._profile_ended(request, error)

    def _drop_profile(self) -> None:
        """Begin an attempt, whose ranks know of no request."""
        if self._profile:
            self._profile_ended(self._profile, "the attempt ended before it was written")
            self._profile = None

    def _profile_ended(self, request: ProfileRequest, why: str) -> None:
        self._add_event(
            "profile-failed", step=self._figures["step"], rank=request.rank, request=request.key, reason=why
        )
