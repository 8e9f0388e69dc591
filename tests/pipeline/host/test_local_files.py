from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.host.local_files import umask_here


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("proc", [Path("/proc"), Path("/nonexistent")])
def test_the_umask_is_found_and_stays(umask: int, proc: Path) -> None:
    before = os.umask(umask)
    try:
        assert umask_here(proc) == umask
    finally:
        assert os.umask(before) == umask
