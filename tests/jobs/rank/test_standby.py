from __future__ import annotations

import os
import subprocess
import sys

import pytest
from ray._private import ray_constants
from ray.core.generated import node_manager_pb2

from jobs.rank import standby
from jobs.rank.standby import WARM_SECONDS, Newcomers, ask_for_successor, rank_environment, start_standbys

WITHOUT_CUDA = """
import sys, torch
asked = []
for name in ("is_available", "device_count", "_lazy_init", "init", "current_device"):
    setattr(torch.cuda, name, lambda *arguments, name=name: asked.append(name) or 0)
from jobs.rank import standby
standby.import_all()
print(asked, [name for name in standby.IMPORTS if name not in sys.modules])
"""


class Starts:
    """Notes who was asked to start how many processes."""

    def __init__(self, *, agrees: bool = True) -> None:
        self.agrees = agrees
        self.asked: list[tuple[str, int]] = []

    def __call__(self, node: str, count: int) -> bool:
        self.asked.append((node, count))
        return self.agrees


def test_a_group_waits_until_processes_have_imported_where_it_will_grow() -> None:
    newcomers, start = Newcomers(), Starts()
    here, room = {"a": 2}, {"a": 2, "b": 4}

    assert not newcomers.are_ready(here, room, 5, start, now=100.0)
    assert not newcomers.are_ready(here, room, 5, start, now=100.0 + WARM_SECONDS / 2)
    assert start.asked == [("b", 3)], "as many as will come, and once"
    assert newcomers.are_ready(here, room, 5, start, now=100.0 + WARM_SECONDS)


def test_a_node_that_comes_later_has_its_own_time() -> None:
    newcomers, start = Newcomers(), Starts()

    assert not newcomers.are_ready({"a": 1}, {"a": 1, "b": 1}, 2, start, now=0.0)
    assert not newcomers.are_ready({"a": 1}, {"a": 1, "b": 1, "c": 2}, 4, start, now=WARM_SECONDS - 1)
    assert start.asked == [("b", 1), ("c", 2)]
    assert not newcomers.are_ready({"a": 1}, {"a": 1, "b": 1, "c": 2}, 4, start, now=WARM_SECONDS)
    assert newcomers.are_ready({"a": 1}, {"a": 1, "b": 1, "c": 2}, 4, start, now=2.0 * WARM_SECONDS)


def test_a_group_grows_at_once_where_nobody_can_wait() -> None:
    start = Starts(agrees=False)

    assert Newcomers().are_ready({"a": 1}, {"a": 1, "b": 1}, 2, start, now=0.0)
    assert start.asked == [("b", 1)]


def test_importing_asks_cuda_nothing_and_leaves_nothing_out() -> None:
    """The process is given its GPU later: what CUDA was told before would hold."""
    environment = {**os.environ, "DS_ACCELERATOR": "cuda"}
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_CUDA], env=environment, capture_output=True, text=True, check=True
    )

    assert ended.stdout == "[] []\n", ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("environ", "cpus", "threads"),
    [({}, 4.0, "4"), ({}, 0.5, "1"), ({"OMP_NUM_THREADS": "3"}, 4.0, "3"), ({"OMP_NUM_THREADS": ""}, 2.5, "2")],
)
def test_torch_computes_on_the_cpus_of_a_rank(environ: dict[str, str], cpus: float, threads: str) -> None:
    """Ray says so when an actor starts, which is after a process that waits has imported torch."""
    assert rank_environment(environ, "cpu", cpus, standby=True)["OMP_NUM_THREADS"] == threads


class Warned:
    """What a test's process was warned of."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.name == standby.__name__]


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Warned:
    return Warned(caplog)


def test_a_ray_that_cannot_start_processes_costs_one_warning(warned: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(node_manager_pb2, "PrestartWorkersRequest")

    assert not any(start_standbys(("127.0.0.1", 1), "{}", 1) for _ in range(3))

    (line,) = warned.lines
    assert line.startswith("no standbys wait on 127.0.0.1: ray: must have ray.core.generated.node_manager_pb2.Prestart")


def test_a_rank_without_a_successor_is_warned_once(warned: Warned) -> None:
    """Here there is no raylet: this process is not connected."""
    assert not ask_for_successor()
    assert not ask_for_successor()

    (line,) = warned.lines
    assert line.startswith("no standby waits for this rank's place: ")


def test_a_ray_without_the_hook_starts_ranks_all_the_same(warned: Warned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ray_constants, "WORKER_PROCESS_SETUP_HOOK_ENV_VAR")

    assert rank_environment({}, "cpu", 2.0, standby=True) == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"}

    (line,) = warned.lines
    assert line.startswith("standbys cannot import anything in advance: ray: must have ray._private.ray_constants.")
