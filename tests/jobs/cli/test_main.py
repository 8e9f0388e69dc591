"""The command itself: its errors, its exit codes, and a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Ended, Typed, assert_refused

import jobs

NOWHERE = "127.0.0.1:9"  # the discard port, on which nothing listens


pytestmark = pytest.mark.usefixtures("no_stack")


def test_an_unreachable_object_store_is_reported_in_seconds(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{NOWHERE}")

    assert_refused(typed("inspect", "tiny", "data=s3://bucket/data"), "must be reachable", "AWS_ENDPOINT_URL")


@pytest.mark.parametrize("arguments", [["history"], ["nonsense"], ["list", "--nonsense"], ["shard", "a"]])
def test_misuse_exits_2(typed: Typed, arguments: list[str]) -> None:
    ended = typed(*arguments)

    assert ended.code == 2
    assert "Traceback" not in ended.error


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(jobs.__file__).parent.parent)}
    command = [sys.executable, "-m", "jobs.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_inspect_prints_the_papers_plan() -> None:
    ended = in_a_process("inspect", "convmae_base")

    fields = {line[:30].strip(): line[30:].strip() for line in ended.stdout.splitlines()}
    assert (ended.returncode, ended.stderr) == (0, "")
    assert fields["steps per epoch"] == "312"
    assert fields["total steps"] == f"{312 * 1600:,}"
    assert {"parameters", "FLOPs per image", "bytes per epoch"} <= {field for field, value in fields.items() if value}


def test_bad_input_ends_a_process_with_one_line() -> None:
    ended = in_a_process("pretrain", "tiny", "epoch=3")

    assert_refused(Ended(ended.returncode, ended.stdout, ended.stderr), "did you mean epochs?")


def test_a_deleted_current_folder_is_reported_before_anything_is_looked_up_in_it(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    ended = typed("list")

    assert ended.code == 2
    assert ended.error.startswith("error: current folder: must exist") and ended.error.count("\n") == 1
