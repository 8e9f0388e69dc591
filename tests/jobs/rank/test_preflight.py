"""The check of a group's nodes before its ranks connect, with ranks in threads in place of Ray's workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from jobs.errors import PreflightError
from jobs.health.interface import ProbeResult
from jobs.rank import preflight
from jobs.rank.preflight import Preflight, RankNode, check_here
from jobs.recipe.named_recipes import named_recipe

TWO_NODES = (RankNode("id-a", "a", "127.0.0.1"), RankNode("id-a", "a", "127.0.0.1"), RankNode("id-b", "b", "127.0.0.1"))


class Group:
    """A worker group whose ranks are threads; `instead` is what a rank does in place of its check."""

    def __init__(self, threads: ThreadPoolExecutor, instead: Mapping[int, Callable[[], Any]]) -> None:
        self._threads, self._instead = threads, instead
        self.asked: list[str] = []

    def execute_single_async(self, rank: int, function: Callable[..., Any], *words: Any) -> Future[Any]:
        self.asked.append(f"{rank} {function.__name__}")
        if function is check_here and rank in self._instead:
            return self._threads.submit(self._instead[rank])
        return self._threads.submit(function, *words)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    """Threads whose futures are what Ray's replies would be."""

    def get(reply: Any, timeout: float | None = None) -> Any:
        if isinstance(reply, list):
            return [each.result(timeout) for each in reply]
        return reply.result(timeout) if isinstance(reply, Future) else reply

    def wait_for(replies: Sequence[Future[Any]], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        done, left = wait(replies, timeout)
        return list(done), list(left)

    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr("ray.wait", wait_for)
    with ThreadPoolExecutor(8) as pool:
        yield pool


def checked(threads: ThreadPoolExecutor, folder: Path, instead: Mapping[int, Callable[[], Any]]) -> dict[str, str]:
    """Which nodes the monitor is given, and why."""
    given: dict[str, str] = {}
    monitor = SimpleNamespace(preflight_failed=SimpleNamespace(remote=given.update))
    group = Group(threads, instead)
    try:
        Preflight(monitor, (folder,), on_gpu=False).check(group, TWO_NODES)
    except PreflightError as error:
        assert given and all(reason in str(error) for reason in given.values())
    else:
        assert not given
        assert group.asked[3:] == [
            "0 receive_once",
            "2 receive_once",
            "0 sent_bytes_per_second",
            "2 sent_bytes_per_second",
        ]
    return given


def dead() -> Any:
    raise RayActorError(error_msg="The actor died unexpectedly\nkilled by SIGKILL")


def test_nodes_that_are_well_start_soon(threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    checked(threads, tmp_path, {})
    began = time.process_time()

    assert not checked(threads, tmp_path, {})
    assert time.process_time() - began < 2.0, "of three ranks"


def test_the_node_of_a_rank_that_fails_is_named(threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    wrong = {"memory": ProbeResult(passed=False, detail="1 of 8 words differ")}

    found = checked(threads, tmp_path, {1: lambda: wrong})

    assert found == {"id-a": "a: the check of its memory failed: 1 of 8 words differ"}


def test_a_rank_that_dies_in_its_check_has_failed_it(threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    assert list(checked(threads, tmp_path, {2: dead})) == ["id-b"]


def test_a_rank_that_hangs_in_its_check_has_failed_it(
    threads: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "PREFLIGHT_SECONDS", 1.0)

    found = checked(threads, tmp_path, {2: lambda: time.sleep(2.0)})

    assert found == {"id-b": "b: the check of its answer failed: it did not finish within 1 s"}


def test_the_recipe_turns_it_off_and_names_the_folders() -> None:
    recipe = named_recipe("tiny").amended({"cache_dir": "/var/cache/blocks", "device": "cpu"})

    told = Preflight.of(recipe, None)
    assert told and (told.folders, told.on_gpu) == ((Path("/var/cache/blocks"),), False)
    assert Preflight.of(recipe.amended({"preflight": False}), None) is None
