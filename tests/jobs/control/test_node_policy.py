"""The scaling policy alone, with a monitor that answers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from jobs.cluster.ray_internals.train import NoopDecision, ResizeDecision, ScalingConfig
from jobs.control import node_policy
from jobs.control.node_policy import FollowNodes, PolicyCluster
from jobs.monitor.settings import Settings
from jobs.step.instruction import PAUSE_SECONDS


class Monitor:
    """Of the run: notes what it was asked; `stands_still` is what the ranks do. It leaves no node out."""

    nodes_left_out = SimpleNamespace(remote=set)

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.stands_still = False
        self.changed = Settings()

    def __getattr__(self, name: str) -> Any:
        def remote(*_: object) -> Any:
            if name == "settings":
                return self.changed
            self.asked.append(name)
            return self.stands_still

        return SimpleNamespace(remote=remote)


class Client:
    """Asks for resources in vain."""

    def __init__(self, requester: str) -> None:
        self.requester = requester

    def send_resource_request(self, *_: Any) -> None:
        pass

    maybe_send_resource_request = send_resource_request


class Clock:
    """Says what time the test has made it."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Policy(FollowNodes):
    """With room that the test says, counted anew each time."""

    client = Client
    count_seconds = 0.0
    there: Mapping[str, Mapping[str, float]]

    def count_room(self) -> Mapping[str, Mapping[str, float]]:
        return self.there


def rooms(*cpus: int) -> Mapping[str, Mapping[str, float]]:
    return {f"node-{number}": {"CPU": float(count)} for number, count in enumerate(cpus)}


def scaling() -> ScalingConfig:
    return ScalingConfig(num_workers=(1, 3), resources_per_worker={"CPU": 1.0}, elastic_resize_monitor_interval_s=0.0)


@pytest.fixture
def monitor() -> Monitor:
    return Monitor()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def policy(monitor: Monitor, clock: Clock) -> Policy:
    answer: Callable[..., Any] = lambda reply, **_: reply  # noqa: E731
    policy = Policy(scaling(), monitor, "s3://b/runs/first", standby=False, answer=answer, now=clock)
    policy.there = rooms(1, 1)
    policy.after_controller_start(None)
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
    policy.there = rooms(1, 1, 1)

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
    policy.there = rooms(1, 1, 1)
    decide(2)
    policy.there = rooms(1)
    monitor.stands_still = True

    assert decide(2) == 1


def test_ranks_that_take_too_long_to_save_train_on(
    monitor: Monitor, policy: Policy, decide: Callable[[int], int | None], clock: Clock
) -> None:
    policy.there = rooms(1, 1, 1)
    decide(2)
    clock.seconds += PAUSE_SECONDS + 1.0

    assert decide(2) is None
    assert monitor.asked == ["pause", "pause", "end_pause"]
    assert decide(2) is None, "the next look tries again"
    assert monitor.asked[3:] == ["pause"]


def test_a_group_that_ended_while_it_saved_is_started_as_large_as_there_is_room(
    monitor: Monitor, policy: Policy, decide: Callable[[int], int | None]
) -> None:
    policy.there = rooms(1, 1, 1)
    decide(2)

    decision = policy.make_decision_for_non_running_worker_group()

    assert decision.num_workers == 3
    assert decide(3) is None
    assert monitor.asked == ["pause"]


def test_a_group_never_shrinks_while_its_ranks_live(policy: Policy, decide: Callable[[int], int | None]) -> None:
    policy.there = rooms(1)

    assert decide(2) is None


class Coordinator:
    """Of Ray, as a handle: counts for the run, or is on a node that is gone."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error
        self.get_reserved_resources = self

    def remote(self, requester: str, *, recompute: bool) -> Any:
        assert recompute and requester == "s3://b/runs/first"
        return rooms(1, 1) if self._error is None else self._error


class OneNodeGone(PolicyCluster):
    """A cluster that has lost the node of its coordinator."""

    def __init__(self) -> None:
        self.ended: list[set[str]] = []

    def unusable_nodes(self) -> set[str]:
        return {"gone"}

    def end_coordinator_on(self, nodes: set[str]) -> bool:
        self.ended.append(nodes)
        return True


def test_a_coordinator_that_was_lost_with_its_node_is_ended_and_made_anew() -> None:
    handles = [Coordinator(ray.exceptions.ActorUnschedulableError("its node is dead")), Coordinator()]
    requests: list[str] = []

    class CoordinatorClient(Client):
        def __init__(self, requester: str) -> None:
            self._autoscaling_coordinator = handles.pop(0)
            requests.append(requester)

    class ForACoordinator(FollowNodes):
        client = CoordinatorClient
        count_seconds = 0.0

    def answer(reply: Any, timeout: float) -> Any:
        if isinstance(reply, Exception):
            raise reply
        return reply

    cluster = OneNodeGone()
    policy = ForACoordinator(
        scaling(), Monitor(), "s3://b/runs/first", standby=False, cluster=cluster, answer=answer, now=Clock()
    )
    policy.after_controller_start(None)

    assert policy.room() == {}
    assert policy.last_room == {}
    assert policy.room() == rooms(1, 1)
    assert cluster.ended == [{"gone"}]
    assert requests == ["s3://b/runs/first"] * 2


def test_only_a_coordinator_on_a_node_that_is_gone_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[list[str]] = []
    monkeypatch.setattr(node_policy, "living_actors", lambda name: {"a1": "gone", "a2": "here"})
    monkeypatch.setattr(node_policy, "end_actors", lambda address, actors: ended.append(actors))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="head:6379"))

    assert PolicyCluster().end_coordinator_on({"gone"})
    assert not PolicyCluster().end_coordinator_on({"elsewhere"})
    assert ended == [["a1"]]


def test_a_group_is_kept_off_nodes_that_do_not_answer() -> None:
    class TwoNodesGone(PolicyCluster):
        def unusable_nodes(self) -> set[str]:
            return {"b", "a"}

    class Counting(FollowNodes):
        client = Client

        def reserved_reply(self) -> Any:
            return rooms(1)

    answer: Callable[..., Any] = lambda reply, **_: reply  # noqa: E731
    policy = Counting(scaling(), Monitor(), "url", standby=False, cluster=TwoNodesGone(), answer=answer)
    assert policy.on_controller_start_worker_group() is None

    policy.room()

    assert policy.on_controller_start_worker_group() == {"ray.io/node-id": "!in(a,b)"}


@pytest.mark.parametrize(
    ("left_out", "min_workers", "used"),
    [
        (set(), 1, {"a", "b", "c"}),
        ({"b"}, 1, {"a", "c"}),
        ({"b"}, 2, {"a", "c"}),
        ({"b"}, 3, {"a", "b", "c"}),
        ({"a", "b", "c"}, 1, {"a", "b", "c"}),
        ({"gone before"}, 3, {"a", "b", "c"}),
    ],
)
def test_nodes_that_the_run_leaves_out_are_used_only_if_min_workers_need_them(
    left_out: set[str], min_workers: int, used: set[str]
) -> None:
    room = {name: {"CPU": 1.0} for name in "abc"}

    class Leaving(FollowNodes):
        client = Client

        def reserved_reply(self) -> Any:
            return room

    class AllAnswer(PolicyCluster):
        def unusable_nodes(self) -> set[str]:
            return set()

    class Avoiding(Monitor):
        nodes_left_out = SimpleNamespace(remote=lambda: left_out)

    config = ScalingConfig(num_workers=(min_workers, 3), resources_per_worker={"CPU": 1.0})
    answer: Callable[..., Any] = lambda reply, **_: reply  # noqa: E731
    policy = Leaving(config, Avoiding(), "url", standby=False, cluster=AllAnswer(), answer=answer)

    assert set(policy.room()) == used

    avoided = {"a", "b", "c"} - used
    selector = policy.on_controller_start_worker_group()
    assert selector == ({"ray.io/node-id": f"!in({','.join(sorted(avoided))})"} if avoided else None)


def test_what_is_left_out_is_remembered_while_the_monitor_is_away() -> None:
    answers: list[Any] = [{"node-1"}, ray.exceptions.ActorUnavailableError("restarting", None)]

    class Leaving(FollowNodes):
        client = Client
        count_seconds = 0.0

        def reserved_reply(self) -> Any:
            return rooms(1, 1)

    def answer(reply: Any, **_: Any) -> Any:
        if not isinstance(reply, set):
            return reply
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    class AllAnswer(PolicyCluster):
        def unusable_nodes(self) -> set[str]:
            return set()

    policy = Leaving(scaling(), Monitor(), "url", standby=False, cluster=AllAnswer(), answer=answer)

    assert [set(policy.room()), set(policy.room())] == [{"node-0"}] * 2
    assert not answers


def test_the_policy_travels_to_the_controller_by_name_and_takes_no_state_of_ray_along() -> None:
    sent = FollowNodes(scaling(), None, "s3://b/runs/first", standby=True)

    there = ray.cloudpickle.loads(ray.cloudpickle.dumps(sent))

    assert there._answer is sent._answer
    assert there._now is sent._now
    assert len(ray.cloudpickle.dumps(sent)) < 4096


def test_what_was_set_begins_another_attempt_of_as_many_workers_as_it_allows(
    monitor: Monitor, policy: Policy, decide: Callable[[int], int | None]
) -> None:
    policy.there = rooms(1, 1, 1, 1)
    monitor.changed = Settings(min_workers=2, max_workers=2, resize_seconds=7.0, version=1)

    assert decide(3) is None
    assert monitor.asked == ["pause"]
    monitor.stands_still = True
    assert decide(3) == 2, "fewer than there is room for"
    assert policy.scaling_config.elastic_resize_monitor_interval_s == 7.0

    assert [decide(2), decide(2)] == [None, None], "also before the new ranks have spoken"
    monitor.changed = monitor.changed._replace(version=2)
    assert decide(2) == 2


def test_the_same_number_of_workers_begins_anew_with_what_was_set(
    monitor: Monitor, decide: Callable[[int], int | None]
) -> None:
    monitor.changed = Settings(min_workers=1, max_workers=3, resize_seconds=0.0, version=1)
    monitor.stands_still = True

    assert decide(2) == 2


def test_a_minimum_that_there_is_no_room_for_stops_no_training(
    monitor: Monitor, decide: Callable[[int], int | None]
) -> None:
    monitor.changed = Settings(min_workers=3, max_workers=3, resize_seconds=0.0, version=1)

    assert [decide(2), decide(2)] == [None, None]
    assert monitor.asked == []


def test_a_group_that_was_started_after_a_change_has_followed_it(
    monitor: Monitor, policy: Policy, decide: Callable[[int], int | None]
) -> None:
    monitor.changed = Settings(min_workers=1, max_workers=2, resize_seconds=0.0, version=1)
    monitor.stands_still = True
    decision = policy.make_decision_for_non_running_worker_group()

    assert decision.num_workers == 2
    assert decide(2) is None
