"""This project's own code: where it lies, which commit it is, and the command line of a process that runs it."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "CONVMAE_GIT_COMMIT"
"""Holds the commit where the code travels without its history: `convmae submit` sets it for the job."""

PROJECT = Path(__file__).resolve().parents[2]


def module_command(python: str, module: str, *arguments: str) -> list[str]:
    """The command line of a process of ours; `python -m` alone would put the current folder before our packages."""
    return [python, "-P", "-m", module, *arguments]


def module_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of such a process: it finds our packages, wherever it starts."""
    path = os.pathsep.join(filter(None, [str(PROJECT), environ.get("PYTHONPATH")]))
    return {**environ, "PYTHONPATH": path}


def git_commit(environ: Mapping[str, str], project: Path = PROJECT) -> str:
    """The commit, followed by `-dirty` if files differ from it; empty if it is unknown."""
    if VARIABLE in environ:
        return environ[VARIABLE]
    return _described(project)


@functools.lru_cache(maxsize=4)
def _described(project: Path) -> str:
    if not (project / ".git").exists():  # a package inside another repository has another history
        return ""
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
