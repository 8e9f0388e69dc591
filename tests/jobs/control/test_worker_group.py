"""How a worker group is resized: the scaling policy alone, with a monitor that answers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.config import ScalingConfig

from jobs.control import worker_group
from jobs.control.worker_group import FollowNodes
from jobs.rank.instruction import PAUSE_SECONDS


class Monitor:
    """Of the run: notes what it was asked; `stands_still` is what the ranks do."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.stands_still = False

    def __getattr__(self, name: str) -> Any:
        def remote(*_: object) -> bool:
            self.asked.append(name)
            return self.stands_still

        return SimpleNamespace(remote=remote)


class Policy(FollowNodes):
    """With room that the test says, at a time that it says."""

    room: Mapping[str, Mapping[str, float]]

    def _maybe_send_resource_request(self) -> None:
        pass

    def _get_reserved_resources(self) -> Any:
        self._latest_reserved_resources = self.room
        return self.room


def rooms(*cpus: int) -> Mapping[str, Mapping[str, float]]:
    return {f"node-{number}": {"CPU": float(count)} for number, count in enumerate(cpus)}


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Monitor:
    monkeypatch.setattr(worker_group.ray, "get", lambda answer, **_: answer)
    return Monitor()


@pytest.fixture
def policy(monitor: Monitor) -> Policy:
    scaling = ScalingConfig(
        num_workers=(1, 3), resources_per_worker={"CPU": 1.0}, elastic_resize_monitor_interval_s=0.0
    )
    policy = Policy(scaling, monitor, "s3://b/runs/first", standby=False)
    policy.room = rooms(1, 1)
    return policy


@pytest.fixture
def decide(policy: Policy) -> Callable[[int], int | None]:
    """Asks what to do with a group of so many workers; how many it is to have, None for no change."""

    def decide(workers: int) -> int | None:
        group = SimpleNamespace(num_workers=workers, start_time=float("-inf"), workers=[])
        decision = policy.make_decision_for_running_worker_group(group, None)
        assert isinstance(decision, NoopDecision | ResizeDecision)
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    return decide


def test_a_group_grows_when_its_ranks_have_saved_and_not_again(
    monitor: Monitor, policy: Policy, decide: Callable[[int], int | None]
) -> None:
    assert decide(2) is None
    assert monitor.asked == []
    policy.room = rooms(1, 1, 1)

    assert [decide(2), decide(2)] == [None, None], "the controller looks after the ranks meanwhile"
    assert monitor.asked == ["pause", "pause"]
    monitor.stands_still = True
    assert decide(2) == 3

    monitor.stands_still = False
    assert decide(3) is None
    assert monitor.asked == ["pause", "pause", "pause"]


def test_room_that_is_gone_when_the_ranks_have_saved_is_not_asked_for(
    monitor: Monitor, policy: Policy, decide: Callable[[int], int | None]
) -> None:
    policy.room = rooms(1, 1, 1)
    decide(2)
    policy.room = rooms(1)
    monitor.stands_still = True

    assert decide(2) == 1


def test_ranks_that_take_too_long_to_save_train_on(
    monitor: Monitor, policy: Policy, decide: Callable[[int], int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(worker_group.time, "monotonic", lambda: now)
    policy.room = rooms(1, 1, 1)
    decide(2)
    now += PAUSE_SECONDS + 1.0

    assert decide(2) is None
    assert monitor.asked == ["pause", "pause", "end_pause"]
    assert decide(2) is None, "the next look tries again"
    assert monitor.asked[3:] == ["pause"]


def test_a_group_that_ended_while_it_saved_is_started_as_large_as_there_is_room(
    monitor: Monitor, policy: Policy, decide: Callable[[int], int | None]
) -> None:
    policy.room = rooms(1, 1, 1)
    decide(2)

    decision = policy.make_decision_for_non_running_worker_group()

    assert decision.num_workers == 3
    assert decide(3) is None
    assert monitor.asked == ["pause"]


def test_a_group_never_shrinks_while_its_ranks_live(policy: Policy, decide: Callable[[int], int | None]) -> None:
    policy.room = rooms(1)

    assert decide(2) is None


def test_a_group_is_kept_off_nodes_that_do_not_answer(policy: Policy) -> None:
    assert policy.on_controller_start_worker_group() is None
    policy._unusable = {"b", "a"}

    assert policy.on_controller_start_worker_group() == {"ray.io/node-id": "!in(a,b)"}


class _Coordinator:
    """Of Ray, as a handle: counts for the run, or is on a node that is gone."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.get_reserved_resources = self

    def remote(self, requester: str, *, recompute: bool) -> Any:
        assert recompute and requester == "s3://b/runs/first"
        return ray.put(rooms(1, 1)) if self._error is None else self._error


def test_a_coordinator_that_was_lost_with_its_node_is_ended_and_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = [_Coordinator(ray.exceptions.ActorUnschedulableError("its node is dead")), _Coordinator()]
    ended: list[list[str]] = []
    requests: list[str] = []

    class Client:
        def __init__(self, requester: str) -> None:
            self._autoscaling_coordinator = handles.pop(0)
            requests.append(requester)

        def send_resource_request(self, *_: Any) -> None:
            pass

    def got(reference: Any, timeout: float | None = None) -> Any:
        if isinstance(reference, Exception):
            raise reference
        return rooms(1, 1)

    monkeypatch.setattr(worker_group, "TrainAutoscalingCoordinatorClient", Client)
    monkeypatch.setattr(worker_group, "unusable_nodes", lambda: {"gone"})
    monkeypatch.setattr(worker_group, "living_actors", lambda name: {"a1": "gone", "a2": "here"})
    monkeypatch.setattr(worker_group, "end_actors", lambda address, actors: ended.append(actors))
    monkeypatch.setattr(worker_group.ray, "get", got)
    monkeypatch.setattr(worker_group.ray, "put", lambda value: value)
    monkeypatch.setattr(worker_group.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="head:6379"))
    scaling = ScalingConfig(
        num_workers=(1, 3), resources_per_worker={"CPU": 1.0}, elastic_resize_monitor_interval_s=0.0
    )
    policy = FollowNodes(scaling, Monitor(), "s3://b/runs/first", standby=False)
    policy.after_controller_start(None)

    assert policy._get_reserved_resources() is None
    policy._latest_reserved_resources_query_time = float("-inf")

    assert policy._get_reserved_resources() == rooms(1, 1)
    assert ended == [["a1"]]
    assert requests == ["s3://b/runs/first"] * 2
