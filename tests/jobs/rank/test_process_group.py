from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError

from jobs.cluster.interfaces import UNREACHED_REMEDY
from jobs.cluster.ray_internals.train import WorkerGroupStartupFailedError
from jobs.errors import PreflightError
from jobs.monitor.failure_cause import describe_start_failure
from jobs.rank.preflight import RankNode
from jobs.rank.process_group import RanksBackend, RanksOverNodes, make_ready


class Group:
    """A worker group that notes what its ranks are told to do, until they are to say where they can be met."""

    def __init__(self, error: Exception) -> None:
        self.told: list[Callable[..., Any]] = []
        self._error = error

    def get_resources_per_worker(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def execute(self, function: Callable[..., Any]) -> list[RankNode]:
        self.told.append(function)
        return [RankNode("id-a", "a", "10.0.0.1")]

    def execute_single(self, *_: object) -> None:
        assert self.told == [make_ready], "each rank is checked, and has its interface, before any connects"
        raise self._error


def test_ranks_that_do_not_reach_each_other_are_tried_again() -> None:
    refused = RayTaskError("_setup_torch_process_group", "a traceback", RuntimeError("SO_ERROR: Connection refused"))
    group = Group(refused)

    with pytest.raises(WorkerGroupStartupFailedError) as caught:
        RanksOverNodes().backend_cls().on_start(group, RanksOverNodes())

    policy = create_failure_policy(FailureConfig(max_failures=-1))
    assert policy.make_decision(ControllerError(caught.value)) == FailureDecision.RETRY
    assert policy.make_decision(ControllerError(refused)) == FailureDecision.RAISE, "what Ray Train itself would do"
    line, remedy = describe_start_failure(caught.value)
    assert line == f"start of the ranks: RuntimeError: SO_ERROR: Connection refused; {UNREACHED_REMEDY}"
    assert remedy == "restart"


def test_a_node_that_fails_its_check_is_a_start_that_is_tried_again() -> None:
    class Failing:
        def check(self, group: Group, places: list[RankNode]) -> None:
            assert group.told == [make_ready] and [place.host for place in places] == ["a"]
            raise PreflightError("a: the check of its disk failed: OSError: read-only")

    group, config = Group(RuntimeError("never asked")), RanksOverNodes(preflight=Failing())  # type: ignore[arg-type]

    with pytest.raises(WorkerGroupStartupFailedError) as caught:
        RanksBackend().on_start(group, config)

    line, remedy = describe_start_failure(caught.value)
    assert line == "start of the ranks: PreflightError: a: the check of its disk failed: OSError: read-only"
    assert remedy == "restart"


def test_the_configuration_names_the_backend_that_chooses() -> None:
    assert RanksOverNodes().backend_cls is RanksBackend
