"""The reports of a run's controller to its monitor, and what it asks of the ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from jobs.monitor.failure_cause import Remedy
from jobs.monitor.run_memory import RunMemory
from jobs.rank.watchdog import Examined, Hang, Pulse, hang_text, training_stack

logger = logging.getLogger(__name__)

UNKNOWN_DEADLINE_SECONDS = 120.0
"""Until a node that is drained is gone, where its cloud does not say; Ray Train then ends the attempt after as long."""
LEAST_SAVE_SECONDS = 5.0
"""Left for the last save before a node goes."""
HOSTS_NAMED = 4
"""In a line; a rack may have many."""


class GroupReports(RunMemory):
    """The part of the monitor that the controller calls, and that looks for hangs. As `RunMemory`; never blocks."""

    def waiting(self, possible: int, needed: int) -> None:
        """Note that the cluster has no room for the fewest workers that the run trains with.

        Args:
            possible: Workers that it has room for.
            needed: min_workers.
        """
        with self._lock:
            self._figures.update(waiting=True)
            if not self._instructions.stop_reason:
                self._figures.update(state="waiting")
            reason = f"there is room for {possible} workers, and min_workers is {needed}; waits for nodes"
            self._add_event("waiting", step=self._figures["step"], reason=reason)

    def pause(self) -> bool:
        """Have the ranks save and stand still, because the attempt is about to end; asked again until they do.

        Returns:
            Whether they do by now.
        """
        with self._lock:
            if self._figures["state"] == "running":
                self._instructions.pause()
            return self._instructions.stands_still

    def end_pause(self) -> None:
        """Let the ranks continue, since they took too long."""
        with self._lock:
            self._instructions.withdraw()

    def drain(self, ranks: Sequence[int], seconds: float | None) -> None:
        """Note that nodes are being drained; have the ranks save now, and once more before those go.

        Args:
            ranks: On those nodes.
            seconds: Until they are gone; None where nobody knows.
        """
        with self._lock:
            when = "soon" if seconds is None else f"in {max(0.0, seconds):.0f} s"
            self._add_event("drain", step=self._figures["step"], reason=f"the node of {_named(ranks)} goes away {when}")
            self._instructions.save()
            left = UNKNOWN_DEADLINE_SECONDS if seconds is None else seconds
            last_save = max(LEAST_SAVE_SECONDS, 2 * float(self._figures["checkpoint_seconds"] or 0.0))
            self._instructions.pause_at(self._clock.monotonic() + left - last_save)

    def group_ended(self) -> None:
        """Note that Ray Train has given the attempt up, for whatever reason."""
        with self._lock:
            if self._figures["state"] == "running":
                self._figures.update(state="restarting")

    def worker_failed(self, error: str, remedy: Remedy) -> str:
        """Note why the attempt is about to end; the event of the next one quotes it.

        Args:
            error: The root cause in one line.
            remedy: What may fix it.

        Returns:
            Why the run should be given up; empty to restart it.
        """
        with self._lock:
            self._watch.end()
            self._instructions.trains()
            self._figures.count("failures", label=self._failures.add(error, self._clock.wall()))
            self._figures.group_failed()
            self._record.touch()
            has_trained = self._figures["last_step_at_seconds"] is not None
            return self._failures.verdict(remedy, has_trained=has_trained)

    def unreachable(self, hosts: Mapping[str, str], seconds: float) -> None:
        """Note that nodes with ranks have fallen silent, and that their attempt is being ended for it.

        Args:
            hosts: Name and address of each, by Ray's node id.
            seconds: For how long.
        """
        with self._lock:
            ranks = sorted(rank for node_id in hosts for rank in self._watch.ranks_on(node_id))
            self._watch.end()  # all the others stand still now
            one = len(hosts) == 1
            node, has = ("node", "has") if one else ("nodes", "have")
            whose = (
                f"the {node} of {_named(ranks)}" if ranks else f"{'a ' if one else ''}{node} where ranks were to start"
            )
            text = f"{whose} ({_listed(list(hosts.values()))}) {has} been unreachable for {seconds:.0f} s"
            self._failures.know_cause("NodeUnreachable", text)
            self._add_event("unreachable", step=self._figures["step"], reason=text)

    def look_for_hangs(self, now: float, examine: Callable[[Pulse], Examined]) -> None:
        """Examine and kill the ranks that stand still, if there are any, and report each in an event.

        Args:
            now: Monotonic seconds.
            examine: Finds out about a rank's process and kills it.
        """
        with self._lock:
            hangs = self._watch.hangs(now)
            if hangs:
                self._watch.end()
        for hang in hangs:
            self._report_hang(hang, examine)

    def _report_hang(self, hang: Hang, examine: Callable[[Pulse], Examined]) -> None:
        with self._lock:
            # Before it is killed: the controller asks why as soon as it has seen the death.
            if not self._failures.cause:
                self._failures.know_cause("Hang", hang_text(hang, Examined("being looked at", "")))
        found = examine(hang.pulse)
        text = hang_text(hang, found)
        logger.error("%s\n%s", text, found.stacks)
        with self._lock:
            self._failures.know_cause("Hang", text)
            self._figures.count("hangs")
            self._add_event(
                "hang",
                step=self._figures["step"],
                rank=hang.pulse.rank,
                host=hang.pulse.host,
                pid=hang.pulse.process.pid,
                phase=hang.pulse.phase,
                seconds=round(hang.seconds, 1),
                state=found.state,
                stack=training_stack(found.stacks),
                reason=text,
            )


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _listed(hosts: Sequence[str]) -> str:
    more = f" and {len(hosts) - HOSTS_NAMED} more" if len(hosts) > HOSTS_NAMED else ""
    return "; ".join(hosts[:HOSTS_NAMED]) + more
