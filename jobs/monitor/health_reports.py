"""The health of a run's ranks and nodes, as its monitor knows it: stragglers, failed checks, and what is left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from jobs.health.stragglers import Spell
from jobs.metrics.rank_figures import FigureTable, RankFigures
from jobs.monitor.run_memory import RunMemory

logger = logging.getLogger(__name__)


class HealthReports(RunMemory):
    """The part of the monitor that judges ranks and nodes. Concurrency and failure: as `RunMemory`; never blocks."""

    def preflight_failed(self, nodes: Mapping[str, str]) -> None:
        """Note nodes that failed the check before ranks start; later starts leave them out.

        Args:
            nodes: Why, by Ray's node id; the reason names the host.
        """
        with self._lock:
            self._left_out_nodes |= nodes.keys()
            for reason in nodes.values():
                self._figures.count("preflight_failures")
                self._add_event("preflight-failed", step=self._figures["step"], reason=reason)

    def corrupt(self, *, step: int, found: Sequence[tuple[Sequence[int], str]]) -> None:
        """Note ranks that computed other gradients than the others; later starts leave out the nodes of those named.

        Args:
            step: That was verified.
            found: The ranks that may have erred, one where it is certain, and what they did.
        """
        with self._lock:
            self._figures.count("corruptions")
            certain = sorted({ranks[0] for ranks, _ in found if len(ranks) == 1})
            suspects = certain or sorted({rank for ranks, _ in found for rank in ranks})
            pulses = [pulse for rank in suspects if (pulse := self._watch.pulse_of(rank))]
            if certain:
                self._left_out_nodes |= {pulse.node_id for pulse in pulses}
            self._add_event(
                "corruption",
                step=step,
                ranks=suspects,
                hosts=[pulse.host for pulse in pulses],
                certain=bool(certain),
                reason="; ".join(line for _, line in found),
            )

    def nodes_left_out(self) -> set[str]:
        """Ids of nodes on which no rank should start, if the others have room for min_workers."""
        with self._lock:
            return set(self._left_out_nodes)

    def _look_for_stragglers(self, step: int, ranks: FigureTable | Sequence[RankFigures]) -> None:
        """Judge a finished step; an event for each spell that begins or ends."""
        table = np.asarray(ranks, np.float64).reshape(-1, len(RankFigures._fields))
        began, ended = self._stragglers.see(table, step, self._clock.monotonic())
        for spell in began:
            self._report_straggler(spell)
        self._report_ended(ended, step)
        if began or ended:
            self._figures.update(stragglers=self._stragglers.count)

    def _end_spells(self, step: int) -> None:
        """Begin an attempt, whose ranks may be elsewhere."""
        self._report_ended(self._stragglers.begin_attempt(), step)
        self._figures.update(stragglers=0)

    def _report_straggler(self, spell: Spell) -> None:
        found = spell.straggler
        pulse = self._watch.pulse_of(found.rank)
        host = pulse.host if pulse else ""
        leaves_out = self._config.leave_out_stragglers and pulse is not None
        if leaves_out and pulse:
            self._left_out_nodes.add(pulse.node_id)
        where = f" on {host}" if host else ""
        then = "; its node is left out at the next restart" if leaves_out else ""
        reason = found.reason.replace(f"rank {found.rank}", f"rank {found.rank}{where}", 1) + then
        logger.warning("step %d: %s", spell.first_step, reason)
        self._figures.count("straggler_spells")
        self._add_event(
            "straggler",
            step=spell.first_step,
            rank=found.rank,
            host=host,
            part=found.part,
            own_seconds=round(found.own_seconds, 6),
            others_seconds=round(found.others_seconds, 6),
            reason=reason,
        )

    def _report_ended(self, spells: Sequence[Spell], step: int) -> None:
        for spell in spells:
            rank, seconds = spell.straggler.rank, self._clock.monotonic() - spell.began_at
            reason = f"rank {rank} no longer makes the others wait, which it did from step {spell.first_step} on"
            self._add_event(
                "straggler-ended",
                step=step,
                rank=rank,
                first_step=spell.first_step,
                seconds=round(seconds, 3),
                reason=reason,
            )
