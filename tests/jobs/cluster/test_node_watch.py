from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from jobs.cluster.node_watch import ALONE_SECONDS, SILENT_SECONDS, Silence, silent_nodes

NODES = ("head", "one", "two", "three")


def looks(silence: Silence, answers: Callable[[str, float], bool], seconds: float) -> Iterator[tuple[float, set[str]]]:
    """The nodes found lost at each look, one look a second."""
    for tick in range(int(seconds) + 1):
        yield tick, set(silence.look({node: answers(node, tick) for node in NODES}, 100.0 + tick))


def first_loss(answers: Callable[[str, float], bool], seconds: float = 120) -> tuple[float, set[str]] | None:
    return next(((at, lost) for at, lost in looks(Silence("head"), answers, seconds) if lost), None)


def test_a_node_that_falls_silent_is_lost_within_seven_seconds_and_no_other_is() -> None:
    found = first_loss(lambda node, at: node != "two" or at < 10)

    assert found is not None
    assert found[1] == {"two"}
    assert found[0] - 10 <= 7


@pytest.mark.parametrize("seconds", [1, 2, 3, 4])
def test_a_link_that_is_cut_for_a_moment_costs_nothing(seconds: int) -> None:
    assert first_loss(lambda node, at: node != "two" or not 10 <= at < 10 + seconds) is None


@pytest.mark.parametrize("seconds", [3, 15, 60])
def test_while_no_other_node_answers_it_is_this_one_that_is_cut_off(seconds: int) -> None:
    assert first_loss(lambda node, at: node == "head" or not 10 <= at < 10 + seconds) is None


def test_after_this_node_was_cut_off_the_others_have_time_to_answer_again() -> None:
    late = {"one": 40, "two": 43, "three": 44}

    assert first_loss(lambda node, at: node == "head" or at < 10 or at >= late[node]) is None


def test_how_long_no_other_node_has_answered_is_known() -> None:
    silence = Silence("head")
    for tick in range(31):
        silence.look({node: node == "head" or tick < 5 for node in NODES}, float(tick))
    assert silence.alone_seconds == 26.0 > ALONE_SECONDS
    silence.look(dict.fromkeys(NODES, True), 31.0)
    assert silence.alone_seconds == 0.0


def test_an_overloaded_machine_judges_no_node_by_one_look() -> None:
    silence = Silence("head")
    silence.look(dict.fromkeys(NODES, True), 0.0)

    assert silence.look({**dict.fromkeys(NODES, True), "two": False}, 60.0) == {}


def test_a_lost_node_comes_with_the_seconds_of_its_silence() -> None:
    silence = Silence("head")
    lost: dict[str, float] = {}
    for tick in range(20):
        lost = silence.look({**dict.fromkeys(NODES, True), "two": tick < 10}, float(tick))

    assert lost == {"two": 10.0}
    assert lost["two"] > SILENT_SECONDS


def test_a_node_that_ray_has_forgotten_is_no_longer_judged() -> None:
    silence = Silence("head")
    for tick in range(20):
        silence.look({**dict.fromkeys(NODES, True), "two": False}, float(tick))

    assert silence.look({"head": True, "one": True}, 20.0) == {}
    assert silence.look({"head": True, "one": True, "two": False}, 21.0) == {}


def test_a_node_whose_raylet_accepts_no_connection_is_silent_though_ray_counts_it_as_alive() -> None:
    with socket.create_server(("127.0.0.1", 0)) as raylet, socket.create_server(("127.0.0.1", 0)) as killed:
        ports = {"there": raylet.getsockname()[1], "killed": killed.getsockname()[1]}
        killed.close()
        nodes = [
            {"NodeID": name, "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
            for name, port in ports.items()
        ]

        assert silent_nodes(nodes) == {"killed"}
        assert silent_nodes([{**nodes[1], "Alive": False}]) == set(), "known to be dead"
