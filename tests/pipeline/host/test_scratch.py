from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import in_a_namespace_of_its_own
import pytest

from pipeline.host.scratch import PREFIX, UNSEEN_SECONDS, scratch_folder

KEEPS = """
import sys
from pipeline.host.scratch import scratch_folder
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
        assert other.is_dir(), "no process could delete it yet"

        with scratch_folder() as mine:
            assert list(temporary.iterdir()) == [Path(mine)]


@pytest.mark.skipif(not in_a_namespace_of_its_own.is_allowed(), reason="this machine makes no PID namespaces")
def test_the_folder_of_a_process_in_another_container_stays_while_it_lives(temporary: Path) -> None:
    with in_a_namespace_of_its_own.running(KEEPS) as process:
        assert process.stdout
        other = Path(process.stdout.readline().strip())
        (other / "part").write_text("of a checkpoint")
        with scratch_folder():
            assert (other / "part").exists()

    with scratch_folder() as mine:
        assert list(temporary.iterdir()) == [Path(mine)], "its namespace is gone"


def test_of_folders_that_another_boot_left_old_ones_go(temporary: Path) -> None:
    old, fresh, else_ = (temporary / name for name in (f"{PREFIX}0123-old", f"{PREFIX}0123-new", "convmae-other"))
    for folder in (old, fresh, else_):
        folder.mkdir()
    for folder in (old, else_):
        os.utime(folder, (time.time() - 2 * UNSEEN_SECONDS,) * 2)

    with scratch_folder() as mine:
        assert set(temporary.iterdir()) == {fresh, else_, Path(mine)}


def test_a_link_of_that_name_is_not_followed(temporary: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)

    with scratch_folder():
        assert elsewhere.is_dir() and (temporary / f"{PREFIX}link").is_symlink()


def test_many_that_make_and_sweep_at_once_keep_their_own(temporary: Path) -> None:
    def work(_: int) -> bool:
        with scratch_folder() as folder:
            Path(folder, "part").write_text("x")
            time.sleep(0.001)
            return Path(folder, "part").read_text() == "x"

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(work, range(400)))
    assert list(temporary.iterdir()) == []
