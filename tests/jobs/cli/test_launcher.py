from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import launcher
from jobs.cli.launcher import strange_package
from jobs.run.own_code import module_command

PROJECT = Path(launcher.__file__).resolve().parents[2]


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """The command as an installed script, alone in its folder."""
    (tmp_path / "bin").mkdir()
    return Path(shutil.copy(launcher.__file__, tmp_path / "bin" / "convmae"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files of our packages' names, each of which leaves a trace when it runs."""
    folder = tmp_path / "mine"
    trace = f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)\n"
    for name in ("pipeline.py", "model.py", "jobs/__init__.py", "jobs/cli/main.py", "jobs/stack/keeper.py", "typer.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(trace)
    return folder


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    found = os.pathsep.join([*filter(None, [environment.pop("PYTHONPATH", "")]), str(PROJECT)])
    variables = {**os.environ, **environment, "PYTHONPATH": found}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_a_command_runs_nothing_of_the_folder_in_which_it_is_typed(command: Path, folder: Path, tmp_path: Path) -> None:
    ended = run([sys.executable, str(command), "inspect", "tiny"], folder)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("name ")
    assert not (tmp_path / "ran").exists()


def test_a_process_of_ours_runs_nothing_of_its_current_folder(folder: Path, tmp_path: Path) -> None:
    ended = run(module_command(sys.executable, "jobs.cli.main", "inspect", "tiny"), folder)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("keeps", "name", "path"),
    [
        ("pipeline.py", "pipeline", "mine"),
        ("model.py", "model", "../mine:nowhere"),
        ("jobs", "jobs", "."),
        ("", "jobs", "mine"),
    ],
)
def test_another_package_before_ours_is_reported_in_one_line_and_not_run(
    command: Path, folder: Path, tmp_path: Path, keeps: str, name: str, path: str
) -> None:
    for entry in list(folder.iterdir()):
        if keeps and entry.name != keeps:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    written = str(folder) if path == "mine" else path

    ended = run([sys.executable, str(command), "list"], folder, PYTHONPATH=written)

    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: PYTHONPATH: must not have another `{name}` before ours")
    assert "unset PYTHONPATH" in line and "mine" in line
    assert not (tmp_path / "ran").exists()


def test_one_that_is_not_on_pythonpath_is_reported_as_well(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").touch()

    assert strange_package([str(tmp_path), str(PROJECT)]) == ("model", str(tmp_path / "model"))
    assert strange_package([str(PROJECT), str(tmp_path)]) is None


def test_a_folder_without_code_is_not_another_package(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()  # such as Slurm users have

    assert strange_package([str(tmp_path), str(PROJECT)]) is None
