from __future__ import annotations

import socket

from jobs.cluster.node_view import silent_nodes


def test_a_node_whose_raylet_takes_no_connection_is_silent_though_ray_counts_it_as_alive() -> None:
    with socket.create_server(("127.0.0.1", 0)) as raylet, socket.create_server(("127.0.0.1", 0)) as killed:
        ports = {"there": raylet.getsockname()[1], "killed": killed.getsockname()[1]}
        killed.close()
        nodes = [
            {"NodeID": name, "Alive": True, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
            for name, port in ports.items()
        ]

        assert silent_nodes(nodes) == {"killed"}
        assert silent_nodes([{**nodes[1], "Alive": False}]) == set(), "known to be dead"
