from __future__ import annotations

import subprocess
from pathlib import Path

from jobs.run.own_code import VARIABLE, git_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_knows_its_commit_and_whether_files_differ(tmp_path: Path) -> None:
    for name in ("clean", "changed"):
        folder = tmp_path / name
        folder.mkdir()
        git(folder, "init", "-q")
        (folder / "file").write_text("1")
        git(folder, "add", "file")
        git(folder, "commit", "-qm", "first")
        git(folder, "tag", "v1")
    (tmp_path / "changed" / "file").write_text("2")

    assert git_commit({}, tmp_path / "clean") == git(tmp_path / "clean", "rev-parse", "HEAD")
    assert git_commit({}, tmp_path / "changed") == git(tmp_path / "changed", "rev-parse", "HEAD") + "-dirty"


def test_without_a_history_the_environment_is_asked(tmp_path: Path) -> None:
    assert git_commit({}, tmp_path) == ""
    assert git_commit({VARIABLE: "c0ffee"}, tmp_path) == "c0ffee"
