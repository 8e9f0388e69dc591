"""Every shell script of the repository, by shellcheck."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from manifests import INFRA, ROOT, documents

SCRIPTS = {
    ".ci/run": ROOT / ".ci" / "run",
    "kuberay": INFRA / "kuberay" / "efa-node.sh",
    "slurm": INFRA / "slurm" / "convmae.sbatch",
}
SHELLCHECK = str(Path(sys.executable).parent / "shellcheck")


def findings(text: str, shell: str = "") -> str:
    """What shellcheck says of a script; empty where it finds nothing."""
    command = [SHELLCHECK, "--format=gcc", *([f"--shell={shell}"] if shell else []), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing_in_a_script(name: str) -> None:
    assert findings(SCRIPTS[name].read_text()) == ""


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_finds_nothing_in_the_commands_of_skypilot(part: str) -> None:
    (task,) = documents("skypilot/convmae.yaml")

    assert findings(task[part], "bash") == ""


def test_shellcheck_finds_a_variable_that_is_not_quoted() -> None:
    broken = SCRIPTS["slurm"].read_text().replace('requeue "$SLURM_JOB_ID"', "requeue $SLURM_JOB_ID")

    assert "SC2086" in findings(broken)
