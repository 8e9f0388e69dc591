"""Which nodes are left out, by what their checks found; and the links between nodes, over real sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.health.interface import Evict, HealthState, NodeHealth, ProbeResult
from jobs.health.links import LINK_SPEED, receive_once, sent_bytes_per_second, speed_of_nodes
from jobs.health.node_probes import PRODUCT_SPEED
from jobs.health.preflight import PreflightEvaluator

WELL = ProbeResult(passed=True)


def node(name: str, **results: ProbeResult) -> NodeHealth:
    return NodeHealth(f"id-{name}", name, {"memory": WELL, **results})


def left_out(*nodes: NodeHealth) -> dict[str, str]:
    decisions = PreflightEvaluator().evaluate(HealthState(nodes=nodes))
    assert all(isinstance(decision, Evict) for decision in decisions)
    return {decision.target_nodes[0]: decision.reason for decision in decisions}


def test_nodes_that_are_well_are_used() -> None:
    assert not left_out(node("a"), node("b"))


def test_a_node_is_named_once_with_all_that_it_failed() -> None:
    """Two ranks of the node meet the same disk."""
    broken = ProbeResult(passed=False, detail="OSError: read-only")
    wrong = ProbeResult(passed=False, detail="a product is wrong")

    found = left_out(node("a"), node("b", disk=broken), node("b", disk=broken, product=wrong))

    assert found == {
        "id-b": "b: the check of its disk failed: OSError: read-only; "
        "b: the check of its product failed: a product is wrong"
    }


@pytest.mark.parametrize(
    ("speeds", "slow"),
    [
        ([60e12, 58e12, 12e12, 61e12], ["id-2"]),
        ([60e12, 58e12, 20e12, 61e12], []),
        ([60e12, 12e12], []),
    ],
)
def test_a_gpu_that_is_far_slower_than_the_others_is_left_out(speeds: list[float], slow: list[str]) -> None:
    nodes = [
        node(str(number), product=ProbeResult({PRODUCT_SPEED: speed}, passed=True))
        for number, speed in enumerate(speeds)
    ]

    assert list(left_out(*nodes)) == slow


def test_a_link_is_slow_only_beside_others_and_below_what_is_enough() -> None:
    def linked(*speeds: float) -> list[str]:
        return list(
            left_out(*(node(str(at), link=ProbeResult({LINK_SPEED: value})) for at, value in enumerate(speeds)))
        )

    assert linked(2e9, 10e6, 2e9) == ["id-1"]
    assert linked(2e9, 300e6, 2e9) == []
    assert linked(50e6, 40e6, 45e6) == []


def test_a_node_with_one_slow_link_is_not_slow() -> None:
    speeds = speed_of_nodes(["a", "b", "c"], {"a": 5.0, "b": 900.0, "c": 800.0})

    assert speeds == {"a": 800.0, "b": 900.0, "c": 900.0}


def slowed(upstream: tuple[str, int], bytes_per_second: float) -> tuple[str, int]:
    """An address from which one connection is passed on, no faster than that."""
    server = socket.create_server(("127.0.0.1", 0))

    def relay() -> None:
        with (
            server,
            server.accept()[0] as near,
            socket.create_connection(upstream) as far,
            contextlib.suppress(OSError),
        ):
            answers = threading.Thread(target=lambda: near.sendall(far.makefile("rb").readline()))
            answers.start()
            while piece := near.recv(1 << 16):
                far.sendall(piece)
                time.sleep(len(piece) / bytes_per_second)
            answers.join()

    threading.Thread(target=relay, daemon=True).start()
    return "127.0.0.1", server.getsockname()[1]


def test_a_node_whose_both_links_are_slow_is_found_in_a_ring_of_four() -> None:
    ring = ["a", "b", "c", "d"]
    addresses = [receive_once("127.0.0.1") for _ in ring]
    for receiver in (1, 2):  # what comes to b, and what b sends to c
        addresses[receiver] = slowed(addresses[receiver], 20e6)

    with ThreadPoolExecutor(len(ring)) as threads:
        sent = list(threads.map(sent_bytes_per_second, addresses[1:] + addresses[:1]))

    speeds = speed_of_nodes(ring, dict(zip(ring, sent, strict=True)))
    assert speeds["b"] < 25e6 < min(speeds[name] for name in "acd")
    found = left_out(*(node(name, link=ProbeResult({LINK_SPEED: speed})) for name, speed in speeds.items()))
    assert list(found) == ["id-b"]


def test_a_peer_that_is_not_there_has_no_speed() -> None:
    host, port = receive_once("127.0.0.1")
    assert sent_bytes_per_second((host, port)) > 0

    assert sent_bytes_per_second((host, port)) == 0.0
