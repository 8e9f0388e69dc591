"""One rank's part in memory checkpoints: its copy is handed to its node's holder, and from there to another node's.

As with checkpoints in the store, three stages. Every rank copies its part off the device, for which training pauses.
The holders take it over, while steps continue. When the ranks have seen, by a flag that travels with their loss, that
all are held, rank 0 gathers the list of parts and reports it to the run's monitor, which knows from then on where a
restart finds them. Until then the one before counts, whose memory stays as it is.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.checkpoint.commit import CheckpointFile, Commit
from jobs.checkpoint.held.held_checkpoint import HeldCheckpoint, find_holder, generation_of
from jobs.checkpoint.held.holder import Part, holder_name
from jobs.checkpoint.held.memory_clock import Every, MemoryClock
from jobs.checkpoint.rank_file import RankPart
from jobs.checkpoint.rank_group import RankGroup
from jobs.errors import HolderFullError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NotHeld:
    """Why a rank's part is not held."""

    reason: str
    lacks_memory: bool


def is_ready(reply: Any) -> bool:
    """Whether a reply is there; never waits."""
    import ray

    return bool(ray.wait([reply], timeout=0, fetch_local=False)[0])


def wait_for(reply: Any) -> Any:
    """What a reply holds."""
    import ray

    return ray.get(reply)


def partner_of(node: str, nodes: Sequence[str]) -> str | None:
    """The node that keeps the copies of another one's parts; None where there is one node alone.

    Args:
        node: Whose parts.
        nodes: Of all ranks, by rank.
    """
    each = list(dict.fromkeys(nodes))
    return each[(each.index(node) + 1) % len(each)] if len(each) > 1 else None


class MemoryKeeper:
    """Keeps one rank's newest state in memory.

    Owns: the replies of holders that have not come yet, and the claim on the rank's memory of the newest checkpoint
        that is whole and of the one that is being made.
    Concurrency: the training thread's alone. `begin`, `finish` and `settle` are collective.
    Failure: a holder that is gone, or lacks memory, is reported to the monitor; the checkpoint before stays, and the
        next one is tried when it is due, unless memory lacks: then there are no more in this attempt.
    Blocking: `settle` waits for the holders; nothing else does, but for the exchange of `finish`.
    """

    def __init__(
        self,
        run_url: str,
        monitor: Any,
        group: RankGroup,
        nodes: Sequence[str],
        *,
        every: Every,
        part_bytes: int,
        whole: HeldCheckpoint | None,
        find: Callable[[str], Any] = find_holder,
        ready: Callable[[Any], bool] = is_ready,
        wait: Callable[[Any], Any] = wait_for,
    ) -> None:
        """Find the holders.

        Args:
            run_url: Of the run.
            monitor: Receives a report of each one that is whole or failed.
            group: The ranks that keep their parts together.
            nodes: Id of the node of each rank.
            every: Steps between two, as the recipe says; not 0.
            part_bytes: Of this rank's part.
            whole: The newest one, of an attempt before this.
            find: Gives a holder's handle by its name.
            ready: Whether a reply is there.
            wait: Waits for a reply.
        """
        self._monitor, self._group, self._nodes = monitor, group, nodes
        self._ready, self._wait = ready, wait
        here = nodes[group.rank]
        partner = partner_of(here, nodes)
        self._here = find(holder_name(run_url, here))
        self._there = find(holder_name(run_url, partner)) if partner else None
        self._clock = MemoryClock(every, part_bytes)
        self._whole_generation = whole.generation if whole else ""
        self._whole: RankPart | None = None
        self._part: RankPart | None = None
        self._commit: Commit | None = None
        self._sent: Any = None
        self._reported: Any = None
        self._stall_seconds = 0.0
        self._is_busy = self._is_off = False

    @property
    def is_under_way(self) -> bool:
        """Whether one was begun and is not finished; the same on every rank."""
        return self._commit is not None

    @property
    def is_holding(self) -> bool:
        """Whether this rank's part, or rank 0's report of the whole, is still on its way."""
        replies = (self._sent, self._reported)
        return not all(reply is None or self._ready(reply) for reply in replies)

    def stepped(self, seconds: float, step: int, *, holding: bool) -> None:
        """Note a step that is done, and report what is whole by now. Collective.

        Args:
            seconds: That it took.
            step: Steps done by now.
            holding: Whether some rank's part was still on its way when the ranks exchanged their sums.
        """
        self._clock.stepped(seconds, beside=self.is_under_way)
        self._is_busy = holding
        if not holding:
            self.finish(step)

    def is_due(self, step: int) -> bool:
        """Whether to begin one after so many steps, as rank 0 decides."""
        return not (self._is_off or self._is_busy or self.is_under_way) and self._clock.is_due(step)

    def begin(self, commit: Commit, part: RankPart, stall_seconds: float) -> None:
        """Hand this rank's part over.

        Args:
            commit: What the checkpoint is, without its files; rank 0's is used, claim, attempt and step are the same on
                all.
            part: The copy; its memory is not written to until a later one is whole.
            stall_seconds: For which training stood still for the copy.
        """
        if self._is_off or self.is_under_way:
            return
        began = time.monotonic()
        part.claim()
        self._commit = dataclasses.replace(commit, tensors=part.tensors, optimizer_step=part.optimizer_step)
        self._part, keep = part, self._whole_generation
        name = Part(generation_of(commit), part.places.name)
        self._sent = self._here.hold.remote(name, str(part.path), part.places, keep)
        if self._there is not None:
            self._sent = self._there.copy.remote(name, self._here, self._sent, keep)
        self._clock.began(commit.step)
        self._stall_seconds = stall_seconds + time.monotonic() - began

    def finish(self, step: int) -> None:
        """Report the checkpoint that is under way, once no rank's part is. Collective.

        Args:
            step: Steps done by now.
        """
        if self._commit is None or self._part is None:
            return
        began = time.monotonic()
        commit, part, self._commit, self._part = self._commit, self._part, None, None
        outcome = self._outcome()
        by_rank = self._group.gathered(outcome)
        failures = {rank: found for rank, found in enumerate(by_rank) if isinstance(found, NotHeld)}
        if failures:
            part.release()
            self._is_off = any(found.lacks_memory for found in failures.values())
            self._fail(commit.step, failures)
        else:
            self._replace(part, generation_of(commit))
            self._report(commit, [found for found in by_rank if isinstance(found, CheckpointFile)])
        self._stall_seconds += time.monotonic() - began
        self._clock.ended(step, self._stall_seconds)

    def settle(self, step: int) -> None:
        """Wait until the one that is under way is whole, or has failed. Collective."""
        self.finish(step)
        if self._reported is not None:
            self._wait(self._reported)

    def _outcome(self) -> CheckpointFile | NotHeld:
        try:
            sent: CheckpointFile = self._wait(self._sent)
        except Exception as error:  # of Ray, or what the holder raised
            cause = getattr(error, "cause", error)
            return NotHeld(f"{type(cause).__name__}: {cause}", isinstance(error, HolderFullError))
        finally:
            self._sent = None
        return sent

    def _replace(self, part: RankPart, generation: str) -> None:
        if self._whole:
            self._whole.release()
        self._whole, self._whole_generation = part, generation

    def _report(self, commit: Commit, by_rank: Sequence[CheckpointFile]) -> None:
        if self._group.rank:
            return
        owner = generation_of(commit).rpartition("/")[2]
        files = tuple(dataclasses.replace(file, name=f"{owner}/{file.name}") for file in by_rank)
        nodes = tuple(
            (node, partner) if (partner := partner_of(node, self._nodes)) else (node,) for node in self._nodes
        )
        held = HeldCheckpoint(dataclasses.replace(commit, files=files), nodes)
        self._reported = self._monitor.memory_held.remote(held, stall_seconds=self._stall_seconds)

    def _fail(self, step: int, failures: Mapping[int, NotHeld]) -> None:
        rank, first = next(iter(failures.items()))
        text = f"rank {rank}: {first.reason}"
        logger.warning("the memory checkpoint of step %d failed: %s", step, text)
        if self._group.rank == 0:
            self._monitor.memory_not_held.remote(step=step, error=text, is_off=self._is_off)
