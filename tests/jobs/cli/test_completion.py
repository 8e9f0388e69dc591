"""What a shell is answered when a line with a run's name is to be completed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli import completion, launcher

PROJECT = Path(launcher.__file__).resolve().parents[2]

Complete = Callable[..., list[str]]


@pytest.fixture
def complete(no_stack: None, tmp_path: Path) -> Complete:
    """Completes the last word of a line, as the script of a shell has it done; nothing else may be written."""
    (tmp_path / "bin").mkdir()
    command = shutil.copy(launcher.__file__, tmp_path / "bin" / "convmae")

    def run(line: str, shell: str = "bash", **environment: str) -> list[str]:
        words = line.split(" ")
        asked = {
            completion.VARIABLE: f"complete_{shell}",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
            "_TYPER_COMPLETE_ARGS": line,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        variables = {**os.environ, "PYTHONPATH": str(PROJECT), **asked, **environment}
        found = [sys.executable, str(command)]
        ended = subprocess.run(found, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout.split()

    return run


@pytest.fixture
def runs(tmp_path: Path) -> str:
    for name in ("base-1", "base-2", "small", ".hidden", "No Run"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.json").write_text("{}")
    return str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("convmae status ", ["base-1", "base-2", "small"]),
        ("convmae status b", ["base-1", "base-2"]),
        ("convmae history base-2", ["base-2"]),
        ("convmae logs --follow s", ["small"]),
        ("convmae diff base-1 s", ["small"]),
        ("convmae compare base-1 base-2 s", ["small"]),
        ("convmae export sm", ["small"]),
        ("convmae evaluate sm", ["small"]),
        ("convmae finetune tiny_finetune --from b", ["base-1", "base-2"]),
        ("convmae resume x", []),
        ("convmae status ./runs/b", []),
    ],
)
def test_names_are_those_under_the_run_root(complete: Complete, runs: str, line: str, names: list[str]) -> None:
    assert complete(line, CONVMAE_RUN_ROOT=runs) == names


def test_a_run_root_in_the_line_counts(complete: Complete, runs: str) -> None:
    assert complete(f"convmae status --run-root {runs} sm") == ["small"]


def test_another_shell_is_answered_too(complete: Complete, runs: str) -> None:
    assert complete("convmae status sm", shell="fish", CONVMAE_RUN_ROOT=runs) == ["small"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"CONVMAE_RUN_ROOT": "/nowhere"},
        {"CONVMAE_RUN_ROOT": "nonsense://b"},
        {"RAY_ADDRESS": "no address"},
        {"CONVMAE_RUN_ROOT": "s3://b/runs", "AWS_CONFIG_FILE": "/nowhere", "AWS_PROFILE": "nobody"},
    ],
)
def test_where_no_name_is_known_none_is_offered_and_nothing_said(
    complete: Complete, environment: dict[str, str]
) -> None:
    assert complete("convmae status ", **environment) == []


def test_a_store_that_does_not_answer_is_not_waited_for(complete: Complete, runs: str) -> None:
    began = time.monotonic()
    assert complete("convmae status s", CONVMAE_RUN_ROOT=runs) == ["small"]
    usual_seconds = time.monotonic() - began

    with socket.create_server(("127.0.0.1", 0)) as server:  # connections wait in its backlog forever
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        found = complete("convmae status s", CONVMAE_RUN_ROOT="s3://b/runs", AWS_ENDPOINT_URL=address)

    assert found == []
    assert time.monotonic() - began < 3 * usual_seconds + completion.PATIENCE_SECONDS + 5
