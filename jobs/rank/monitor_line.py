"""One rank's line to the run's monitor, over Ray: what it reports, and what it is instructed to do."""

from __future__ import annotations

import functools
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.checkpoint.held.held_checkpoint import HeldCheckpoint
from jobs.checkpoint.restore import Source
from jobs.metrics.rank_figures import FigureTable
from jobs.metrics.utilization import GroupCompute
from jobs.rank.watchdog import RankPulse
from jobs.run.profile_request import ProfileRequest
from jobs.step.instruction import Instruction
from jobs.step.non_finite import SkippedSteps
from jobs.step.step_reading import StepReading
from jobs.step.step_verification import Verdict

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class MonitorLine:
    """The calls of one rank to the monitor.

    Owns: replies that have not come yet. Concurrency: the training thread's alone. Failure: a monitor that died raises
    where a reply is waited for, and the restart repeats what was lost with it. Blocking: as each method says.
    """

    def __init__(self, monitor: ActorHandle[Any]) -> None:
        """Keep the monitor's handle; nothing is sent."""
        self._monitor = monitor
        self._reply: Any = None
        self._quarantined: list[Any] = []

    def memory_checkpoint(self) -> HeldCheckpoint | None:
        """The newest one that the run's nodes hold, as the monitor knows it; waits."""
        held: HeldCheckpoint | None = self._answer(self._monitor.memory_checkpoint.remote())
        return held

    def begin_attempt(
        self,
        *,
        world_size: int,
        resume_step: int,
        source: Source | None,
        counters: dict[str, float],
        started_at_seconds: float,
        compute: GroupCompute,
    ) -> int:
        """Number a new attempt, as rank 0; waits."""
        number: int = self._answer(
            self._monitor.begin_attempt.remote(
                world_size=world_size,
                resume_step=resume_step,
                source=source,
                counters=counters,
                host=socket.gethostname(),
                started_at_seconds=started_at_seconds,
                compute=compute,
            )
        )
        return number

    @functools.cached_property
    def node_id(self) -> str:
        """Of the node of this rank."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    @property
    def monitor(self) -> ActorHandle[Any]:
        """Its handle."""
        return self._monitor

    def begin_pulse(self, attempt: int, rank: int, limit_seconds: float) -> RankPulse:
        """Start the thread that reports how far the rank is (jobs.rank.watchdog)."""
        return RankPulse(self._monitor, attempt=attempt, rank=rank, node_id=self.node_id, limit_seconds=limit_seconds)

    def restored(self) -> None:
        """Report that the engine holds the checkpoint."""
        self._monitor.restored.remote()

    def report_step(self, row: dict[str, Any], gradient_norm: float, reading: StepReading, ranks: FigureTable) -> None:
        """Report a step that is done."""
        self._reply = self._monitor.record.remote(row, gradient_norm, reading._asdict(), ranks)

    def instruction(self) -> Instruction:
        """The answer to an earlier step, if it is there and new; never waits."""
        import ray

        if self._reply is None or not ray.wait([self._reply], timeout=0)[0]:
            return ""
        # If the monitor died, so did the newest rows of the history: this raises, and the restart does them again.
        reply, self._reply = self._reply, None
        instruction: Instruction = self._answer(reply)
        return instruction

    def forget_reply(self) -> None:
        """Do not follow the answer to the last step: it repeats an instruction that was followed."""
        self._reply = None

    def await_reports(self) -> None:
        """Wait until the monitor has all that was reported."""
        if self._reply is not None:
            self._answer(self._reply)
        self._answer(self._quarantined)
        self._quarantined.clear()

    def settle(self) -> None:
        """Wait until the monitor has all that was reported, before a commit: history and ledger are never lost."""
        self.await_reports()
        self._reply = None  # it may repeat the instruction that the commit follows

    def quarantine(self, rows: Sequence[dict[str, Any]]) -> None:
        """Report samples that were replaced."""
        self._quarantined.append(self._monitor.quarantine.remote(rows))

    def save_began(self, step: int) -> dict[str, float]:
        """Report that the ranks save; waits for the counters that the commit keeps."""
        counters: dict[str, float] = self._answer(self._monitor.save_began.remote(step))
        return counters

    def paused(self) -> None:
        """Report that the ranks have saved and wait; waits for the answer."""
        self._answer(self._monitor.paused.remote())

    def skip(self, rows: Sequence[dict[str, Any]]) -> None:
        """Report steps that are skipped: not trained, but done."""
        self._monitor.skip.remote(rows)

    def roll_back(self, window: SkippedSteps, reason: str) -> None:
        """Report steps that all later attempts skip; waits until storage has it."""
        self._answer(self._monitor.roll_back.remote(**window.to_json(), reason=reason))

    def corrupt(self, step: int, found: Sequence[Verdict]) -> None:
        """Report ranks that computed other gradients than the others; waits."""
        blamed = [(verdict.ranks, verdict.line()) for verdict in found]
        self._answer(self._monitor.corrupt.remote(step=step, found=blamed))

    def take_profile(self, rank: int) -> ProfileRequest | None:
        """What this rank is to profile; waits."""
        request: ProfileRequest | None = self._answer(self._monitor.take_profile.remote(rank))
        return request

    def profiled(self, request: ProfileRequest, step: int, url: str, files: Sequence[str], note: str) -> None:
        """Report a profile that was written; waits, so that the run's end does not overtake it."""
        self._answer(self._monitor.profiled.remote(request, step=step, url=url, files=files, note=note))

    def profile_failed(self, request: ProfileRequest, error: str) -> None:
        """Report a profile that could not be made; waits."""
        self._answer(self._monitor.profile_failed.remote(request, error))

    def memory_lost(self, step: int, reason: str) -> None:
        """Report a memory checkpoint that could not be read; waits."""
        self._answer(self._monitor.memory_lost.remote(step=step, reason=reason))

    def memory_off(self, reason: str) -> None:
        """Report that nothing is kept in memory in this attempt."""
        self._monitor.memory_not_held.remote(step=0, error=reason, is_off=True)

    def counters(self) -> dict[str, float]:
        """What a commit keeps of the run's counters; waits."""
        counters: dict[str, float] = self._answer(self._monitor.counters.remote())
        return counters

    def checkpoint_damaged(self, step: int, reason: str) -> None:
        """Report a checkpoint that is skipped; waits."""
        self._answer(self._monitor.checkpoint_damaged.remote(step=step, reason=reason))

    @staticmethod
    def _answer(reply: Any) -> Any:
        import ray

        return ray.get(reply)
