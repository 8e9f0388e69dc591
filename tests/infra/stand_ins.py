"""Programs in place of a cluster's own, for scripts that are run by tests: each records how it was called."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RECORD = """#!{python}
import json, os, signal, subprocess, sys, time
from pathlib import Path

home = Path({home!r})

def record(**fields):
    with (home / "calls.jsonl").open("a") as file:
        file.write(json.dumps({{"program": {name!r}, "arguments": sys.argv[1:], **fields}}) + "\\n")

"""


class StandIns:
    """A folder of programs to put first in PATH, and what they were called with."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "bin"
        self.folder.mkdir(parents=True)
        self._scripts: list[subprocess.Popen[str]] = []

    def add(self, name: str, body: str) -> None:
        """Add a program: Python, in which `record(...)` notes a call and `home` is the test's folder."""
        program = self.folder / name
        program.write_text(RECORD.format(python=sys.executable, home=str(self.home), name=name) + body)
        program.chmod(0o755)

    def started(self, command: list[str], environ: Mapping[str, str]) -> subprocess.Popen[str]:
        """A script, in a process group of its own; `end` ends what is left of it."""
        script = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._scripts.append(script)
        return script

    def end(self) -> None:
        """Kill what the scripts left behind."""
        for script in self._scripts:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
            script.wait()

    def calls(self, program: str = "") -> list[Mapping[str, Any]]:
        """What was recorded so far, in order; of one program, or of all."""
        path = self.home / "calls.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in found if not program or call["program"] == program]

    def wait_for(self, condition: Callable[[], object], seconds: float = 30.0) -> None:
        """Wait until something was recorded.

        Raises:
            AssertionError: It was not, in time.
        """
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.calls()
            time.sleep(0.05)
