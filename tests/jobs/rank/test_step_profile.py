"""The profile of a process that trains nothing but products. A run's: tests/jobs/control/test_profiled_run.py."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from jobs.rank import step_profile
from jobs.rank.step_profile import FLAME_NAME, OPERATORS_NAME, TRACE_NAME, StepProfile
from jobs.run.directory import RunDirectory
from jobs.run.profile_request import ProfileRequest
from pipeline.store.storage import Storage


class Outcome:
    """What a profile ended with."""

    def __init__(self) -> None:
        self.done: list[tuple[int, str, Sequence[str], str]] = []
        self.failed: list[str] = []

    def finish(self, profile: StepProfile, step: int) -> None:
        profile.finish(step, lambda *words: self.done.append(words), self.failed.append)
        profile.close()


def recorded(run: RunDirectory, steps: int = 2) -> tuple[StepProfile, int]:
    """A profile that has its steps, each of which is one product; how many were recorded."""
    profile, count = StepProfile(ProfileRequest(3, steps, "k"), run, torch.device("cpu")), 0
    assert torch.autograd._profiler_enabled()
    while True:
        torch.ones(8, 8) @ torch.ones(8, 8)
        count += 1
        if profile.stepped():
            return profile, count


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.of(Storage(), str(tmp_path / "runs"), "first")


def no_command(name: str, path: str | None = None) -> None:
    return None


def test_the_steps_are_recorded_and_no_profiler_is_left(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_profile.shutil, "which", no_command)
    profile, count = recorded(run)
    assert profile._profile
    recorder = weakref.ref(profile._profile)
    outcome = Outcome()

    outcome.finish(profile, step=7)

    assert not torch.autograd._profiler_enabled() and recorder() is None, "nothing waits for a collection"
    ((step, url, files, note),) = outcome.done
    assert (step, count) == (7, 2) and not outcome.failed
    assert url == run.path("profiles", "step-00000007-rank-0003")
    assert files == [TRACE_NAME, OPERATORS_NAME] == sorted(files, reverse=True)
    assert note == f"no {FLAME_NAME}: py-spy is not installed on the rank's node"
    (line,) = [line for line in Path(url, OPERATORS_NAME).read_text().splitlines() if "aten::mm " in line]
    assert line.split()[-1] == "2", "the number of calls"


def test_py_spy_that_may_not_look_costs_the_flame_graph_alone(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing, said = tmp_path / "py-spy", tmp_path / "said"
    refusing.write_text(
        f"#!/bin/sh\ntrap '' INT\necho 'Error: Permission Denied: Try running again with elevated rights'\n: >{said}\n"
    )
    refusing.chmod(0o755)
    monkeypatch.setattr(step_profile.shutil, "which", lambda name, path=None: str(refusing))
    outcome = Outcome()

    profile, _ = recorded(run)
    while not said.exists():
        time.sleep(0.01)
    outcome.finish(profile, step=1)

    ((_, _, files, note),) = outcome.done
    assert FLAME_NAME not in files
    assert note == f"no {FLAME_NAME}: Error: Permission Denied: Try running again with elevated rights"


def test_a_store_that_refuses_is_reported_and_raises_nothing(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(step_profile.shutil, "which", no_command)
    monkeypatch.setattr(Storage, "write", refuse)
    outcome = Outcome()

    outcome.finish(recorded(run)[0], step=1)

    assert outcome.failed == ["OSError: the disk is full"] and not outcome.done


def test_files_that_could_not_be_made_are_reported(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = tmp_path / "python"
    ending.write_text("#!/bin/sh\nkill -9 $$\n")
    ending.chmod(0o755)
    monkeypatch.setattr(step_profile.shutil, "which", no_command)
    monkeypatch.setattr("sys.executable", str(ending))
    outcome = Outcome()

    outcome.finish(recorded(run)[0], step=1)

    assert outcome.failed == ["RuntimeError: the process that makes the files was killed by SIGKILL"]
    assert not outcome.done and not run.storage.exists(run.path("profiles"))
