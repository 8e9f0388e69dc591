from __future__ import annotations

from pathlib import Path

from jobs.session import JOB_VARIABLE, PROJECT, Session
from pipeline.storage import Storage


def test_code_travels_to_a_cluster_once_and_the_driver_of_a_job_does_not_send_it_again(tmp_path: Path) -> None:
    shell = {"RAY_ADDRESS": "10.0.0.1:6379"}

    assert Session(shell, tmp_path, None, Storage()).runtime_env() == {"working_dir": str(PROJECT)}
    assert Session({**shell, JOB_VARIABLE: "{}"}, tmp_path, None, Storage()).runtime_env() == {}
