from __future__ import annotations

import socket
from dataclasses import astuple

import pytest

from jobs.stack.ports import GRPC_OFFSET, LOOPBACK, PortError, check_same, choose, is_free


def test_chosen_ports_are_distinct_free_and_below_the_ephemeral_range() -> None:
    ports = choose({})

    everything = {*astuple(ports), *ports.grpc_twins().values()}

    assert len(everything) == len(astuple(ports)) + 4
    assert all(is_free(port) for port in everything)
    assert max(everything) < 32768


def test_grpc_twins_lie_at_the_offset_that_seaweedfs_assumes() -> None:
    ports = choose({})

    assert ports.grpc_twins()["filer"] == ports.filer + GRPC_OFFSET


def test_a_requested_port_is_kept() -> None:
    wanted = choose({}).s3

    assert choose({"s3": wanted, "ray": 0}).s3 == wanted


@pytest.mark.parametrize("address", [LOOPBACK, "0.0.0.0"])
def test_a_port_in_use_is_refused_by_name(address: str) -> None:
    with socket.socket() as other:
        other.bind((address, 0))
        other.listen()
        port = other.getsockname()[1]

        with pytest.raises(PortError) as refusal:
            choose({"s3": port})

    assert refusal.value.field == "--s3-port"
    assert refusal.value.value == port


def test_one_port_for_two_services_is_refused_by_the_second_name() -> None:
    port = choose({}).s3

    with pytest.raises(PortError, match="--ray-port"):
        choose({"s3": port, "ray": port})


def test_a_running_stack_keeps_its_ports() -> None:
    ports = choose({})

    check_same({"s3": 0, "ray": ports.ray}, ports)
    with pytest.raises(PortError, match=f"running stack, {ports.s3}"):
        check_same({"s3": ports.ray}, ports)
