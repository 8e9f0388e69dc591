from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.scratch import scratch_folder

KEEPS = """
import sys
from pipeline.scratch import scratch_folder
folder = scratch_folder()
print(folder.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_goes_with_its_context(temporary: Path) -> None:
    with scratch_folder() as folder:
        assert list(temporary.iterdir()) == [Path(folder)]

    assert list(temporary.iterdir()) == []


def test_the_folder_of_a_process_that_was_killed_goes_when_the_next_one_is_made(temporary: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", KEEPS], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        other = Path(process.stdout.readline().strip())
        with scratch_folder():
            assert other.is_dir(), "its process lives"
        process.kill()
        process.wait()
        assert other.is_dir(), "nobody could delete it yet"

        with scratch_folder() as mine:
            assert list(temporary.iterdir()) == [Path(mine)]


def test_folders_of_other_hosts_and_of_others_stay(temporary: Path) -> None:
    dead = 4_194_399  # above the largest pid of Linux
    elsewhere = temporary / f"convmae-scratch-elsewhere-{dead}-abc"
    else_ = temporary / f"convmae-{dead}"
    left = temporary / f"convmae-scratch-{socket.gethostname()}-{dead}-abc"
    for folder in (elsewhere, else_, left):
        folder.mkdir()

    with scratch_folder() as mine:
        assert set(temporary.iterdir()) == {elsewhere, else_, Path(mine)}
