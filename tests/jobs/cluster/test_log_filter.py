from __future__ import annotations

import pytest

from jobs.cluster.log_filter import own_lines


@pytest.mark.parametrize(
    "line",
    [
        "2026-11-28 07:40:39,123\tINFO worker.py:1841 -- Connecting to existing Ray cluster at 10.0.0.1:6379...",
        "(RayTrainWorker pid=17, ip=10.0.0.2) [W1128 07:40:39.1 socket.cpp:767] [c10d] The client socket has failed",
        "(RayTrainWorker pid=17, ip=10.0.0.2) [rank1]:[W1128 07:40:39.1 ProcessGroup.cpp:1] Warning: x",
        "\x1b[36m(TrainController pid=3)\x1b[0m [2026-11-28 07:40:39,123 W 3 3] core_worker.cc:12: x",
        "(RayTrainWorker pid=17) [Gloo] Rank 0 is connected to 1 peer ranks. Expected number is : 1",
        "I0000 00:00:1764315639.123456    17 chttp2_transport.cc:1182] ping",
        "2026-11-28 07:40:39,123\tINFO packaging.py:385 -- Ignoring upload to cluster for: ['/x/.gitignore']",
    ],
)
def test_lines_of_ray_torch_and_grpc_are_dropped(line: str) -> None:
    assert list(own_lines([line])) == []


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("demo 7/400 running", "demo 7/400 running"),
        ("failed: rank 1 on b (pid 7) has not spoken for 30 s", "failed: rank 1 on b (pid 7) has not spoken for 30 s"),
        (
            "(RayTrainWorker pid=17, ip=10.0.0.2) s3://b/x: attempt 4 failed [repeated 2x across cluster]"
            " (Ray deduplicates logs by default. Set RAY_DEDUP_LOGS=0 to disable log deduplication)",
            "(RayTrainWorker pid=17, ip=10.0.0.2) s3://b/x: attempt 4 failed",
        ),
        ("", ""),
    ],
)
def test_the_projects_own_lines_are_shown_without_what_ray_adds(line: str, shown: str) -> None:
    assert list(own_lines([line])) == [shown]
