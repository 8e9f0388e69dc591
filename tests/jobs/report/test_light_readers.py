"""Commands that only read what a run recorded wait for no package that they do not need."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("jobs.report.status, jobs.cluster.session", "torch ray matplotlib pyarrow numpy.testing"),
        (
            "jobs.report.comparison, jobs.report.run_difference, jobs.report.history_lines",
            "torch ray matplotlib pyarrow",
        ),
        ("jobs.report.report, jobs.control.finish", "torch ray pyarrow matplotlib"),
        ("jobs.export.run_tables", "torch ray matplotlib"),
    ],
)
def test_a_reader_imports_nothing_heavy(modules: str, unwanted: str) -> None:
    code = f"import sys, {modules}; print(*(set({unwanted.split()!r}) & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout.strip() == ""
