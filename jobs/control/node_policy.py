"""The size of a run's worker group: as many workers as the nodes that answer and stay have room for.

Imports Ray Train: import it late.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from jobs.cluster.node_watch import raylet_addresses, unusable_nodes
from jobs.cluster.ray_internals.core import (
    COORDINATOR_CLASS,
    end_actors,
    living_actors,
    not_on,
    own_environment,
)
from jobs.cluster.ray_internals.train import ElasticPolicy, NoopDecision, ResizeDecision
from jobs.monitor.settings import Settings
from jobs.rank.standby import Newcomers, start_standbys
from jobs.step.instruction import PAUSE_SECONDS

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
UNCOUNTED_LOOKS = 5
"""Without an answer to what there is room for, until the run says that it waits, and can be stopped."""


def answer_of(reply: Any, *, timeout: float | None = None) -> Any:
    """What a reply holds; `ray.get` by a name of ours, since its own is not pickled by name and copies Ray's state."""
    return ray.get(reply, timeout=timeout)


class PolicyCluster:
    """The cluster, as far as the policy asks it; a test gives another."""

    def unusable_nodes(self) -> set[str]:
        """Ids of nodes on which no worker can be started."""
        return unusable_nodes()

    def end_coordinator_on(self, nodes: set[str]) -> bool:
        """End the actor that deals out the cluster's resources, where it is on one of these nodes; whether it was."""
        lost = [actor for actor, node in living_actors(COORDINATOR_CLASS).items() if node in nodes]
        if lost:
            end_actors(ray.get_runtime_context().gcs_address, lost)
        return bool(lost)

    def start_standbys(self, node_id: str, worker: Any, count: int) -> bool:
        """Start standbys on a node; returns whether its raylet agreed.

        Args:
            node_id: Of the node.
            worker: Of the group; the standbys can take the place of one like it.
            count: How many.
        """
        address = raylet_addresses().get(node_id)
        try:
            environment = ray.get(worker.execute_async(own_environment), timeout=ANSWER_SECONDS)
        except RayError:
            return False
        return address is not None and start_standbys(address, environment, count)


class FollowNodes(ElasticPolicy):
    """The scaling policy that goes by the nodes that answer and are not being drained.

    Ray Train's own policy goes by a list that is up to 20 s old, and by Ray's health checks: after a node's death it
    asks for a group that cannot be placed, and waits a minute for it. It counts nodes that are being drained, too.
    """

    def __init__(
        self,
        scaling_config: Any,
        monitor: Any,
        run_url: str,
        *,
        standby: bool,
        cluster: PolicyCluster | None = None,
        answer: Callable[..., Any] = answer_of,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Note what to follow; asks nobody yet.

        Args:
            scaling_config: Ray Train's.
            monitor: Handle of the run's monitor, which is told when the run waits, and has the ranks save.
            run_url: In whose name resources are requested.
            standby: Whether processes import where the group will grow before it does.
            cluster: What is asked about nodes.
            answer: Waits for a reply.
            now: Monotonic seconds.
        """
        super().__init__(scaling_config)
        self._monitor, self._run_url, self._standby = monitor, run_url, standby
        self._cluster, self._answer, self._now = cluster or PolicyCluster(), answer, now
        self._waiting = False
        self._asked_settings: Any = None
        self._settings_version = self._followed = 0
        """Of what was set, the newest that is known, and that of which the group is."""
        self._uncounted = 0
        """Looks in a row at which nobody could say what there is room for."""
        self._newcomers = Newcomers()
        self._unusable: set[str] = set()
        self._left_out: set[str] = set()
        """As the monitor said last."""
        self._pause_until: float | None = None

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002
        """Ask for nodes in the run's name, whichever driver it has.

        Ray Train's own policy asks in the name of its controller. One that was killed takes nothing back, and its nodes
        would be kept for it for three minutes more: nothing would be left for the controller after it.
        """
        self.request_resources(self._run_url)

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Start a group of all that can be placed; wait where they are fewer than min_workers, and report it."""
        self._pause_until = None
        self._follow_settings()
        decision = super().make_decision_for_non_running_worker_group()
        waits = isinstance(decision, NoopDecision)
        if waits and not self._waiting and (self._uncounted == 0 or self._uncounted >= UNCOUNTED_LOOKS):
            self._monitor.waiting.remote(self.possible_workers(self.last_room), self.scaling_config.min_workers)
            self._waiting = True
        elif not waits:
            self._waiting, self._followed = False, self._settings_version
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Grow where there is room; a group shrinks when a node is gone, and trains on one that leaves until then.

        The ranks save first. Meanwhile the controller still looks after them, so that one that dies is noticed.
        """
        self._follow_settings()
        if self._pause_until is not None:
            return self._renew_when_saved(worker_group_state.num_workers)
        is_outdated = self._followed < self._settings_version
        if is_outdated and self.possible_workers(self.room()) >= self.scaling_config.min_workers:
            self._pause_until = self._now() + PAUSE_SECONDS
            return self._renew_when_saved(worker_group_state.num_workers)
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision) or decision.num_workers <= worker_group_state.num_workers:
            return NoopDecision()
        if self._is_prepared(decision.num_workers, worker_group_state):
            self._pause_until = self._now() + PAUSE_SECONDS
            return self._renew_when_saved(worker_group_state.num_workers)
        return NoopDecision()

    def on_controller_start_worker_group(self, **_: Any) -> dict[str, str] | None:
        """Keep the group off nodes that Ray believes to be alive; it would wait for what is placed there."""
        return not_on(self._unusable) if self._unusable else None

    def count_room(self) -> Mapping[str, Mapping[str, float]] | None:
        """What is reserved for this run, freshly counted, on nodes that are usable; None if nobody knows."""
        try:
            reserved: dict[str, Any] = self._answer(self.reserved_reply(), timeout=ANSWER_SECONDS)
            self._unusable = self._cluster.unusable_nodes()
        except RayError:
            logger.warning("the cluster's resources could not be counted; trying again", exc_info=True)
            self._uncounted += 1
            self._renew_coordinator()
            return None
        self._uncounted = 0
        usable = {node: what for node, what in reserved.items() if node not in self._unusable}
        return self._without_left_out(usable)

    def _without_left_out(self, room: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
        """The room on nodes that the run has no reason to avoid; all of it where min_workers need the others, too."""
        with contextlib.suppress(RayError):  # a monitor that is being restarted
            self._left_out = self._answer(self._monitor.nodes_left_out.remote(), timeout=ANSWER_SECONDS)
        others = {node: what for node, what in room.items() if node not in self._left_out}
        if len(others) == len(room) or self.possible_workers(others) < self.scaling_config.min_workers:
            return room
        self._unusable = self._unusable | self._left_out
        return others

    def _follow_settings(self) -> None:
        """Take over what was set since."""
        if self._asked_settings is None:
            self._asked_settings = self._monitor.settings.remote()
        try:
            settings: Settings = self._answer(self._asked_settings, timeout=0)
        except GetTimeoutError:  # it is there at the next look
            return
        except RayError:
            self._asked_settings = None
            return
        self._asked_settings, self._settings_version = None, settings.version
        if settings.max_workers:
            self._take_bounds(settings)

    def _take_bounds(self, settings: Settings) -> None:
        config, bounds = self.scaling_config, (settings.min_workers, settings.max_workers)
        config.elastic_resize_monitor_interval_s = settings.resize_seconds
        if (config.min_workers, config.max_workers) != bounds:
            config.num_workers = bounds
            self.request_resources(self._run_url)

    def _renew_when_saved(self, num_workers: int) -> Any:
        """Begin anew on all workers that have room, once the ranks stand still; give it up where they take too long."""
        assert self._pause_until is not None
        try:
            if self._answer(self._monitor.pause.remote()):
                possible = self.possible_workers(self.room())
                if possible >= self.scaling_config.min_workers:  # fewer than before do no harm: all is saved
                    self._pause_until, self._followed = None, self._settings_version
                    return self.resized(possible)
            if self._now() > self._pause_until:
                logger.warning("the %d ranks did not save for a new group; they continue", num_workers)
                self._pause_until = None
                self._answer(self._monitor.end_pause.remote())
        except RayError:
            logger.warning("the run's monitor is being restarted")
        return NoopDecision()

    def _is_prepared(self, num_workers: int, group: Any) -> bool:
        """Whether standbys wait where the group would grow, if there are to be any."""
        if not self._standby:
            return True
        here = Counter(worker.metadata.node_id for worker in group.workers)
        room = {node: self.possible_workers({node: has}) for node, has in self.last_room.items()}

        def start(node_id: str, count: int) -> bool:
            return self._cluster.start_standbys(node_id, group.workers[0], count)

        return self._newcomers.are_ready(here, room, num_workers, start, self._now())

    def _renew_coordinator(self) -> None:
        """Let go of the actor that deals out the cluster's resources, and end it where its node does not answer.

        Ray makes it on the node of whichever driver was the first to ask, and on no other: with that node it would be
        lost to all drivers after it. Who asks for it anew has it on a node of its own.
        """
        self._unusable = self._cluster.unusable_nodes()
        if self._cluster.end_coordinator_on(self._unusable):
            logger.warning("the node of Ray's %s does not answer; it is made anew", COORDINATOR_CLASS)
        self.request_resources(self._run_url)
