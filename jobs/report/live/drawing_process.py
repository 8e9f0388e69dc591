"""The process that draws the page of a live run, so that the monitor's own has no charts to draw.

The monitor starts it when somebody looks at the page, sends it the figures of the moment, and ends it when nobody
looks any more. It has little priority beside the training, and it ends with the monitor, whose end closes its input.
Both sides of the pipe are ours, hence pickle.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jobs.report.live.live_figures import LiveFigures
from jobs.report.live.live_parts import STORE_SECONDS, Drawn, fault_text
from jobs.run.directory import RunDirectory
from jobs.run.own_code import module_command, module_environ
from pipeline.access.profile_keys import Keys

NICENESS = 10
"""A busy core gives it a tenth of the time of a rank's thread."""
END_SECONDS = 5.0


@dataclass(frozen=True)
class _Request:
    figures: LiveFigures
    keys: Keys | None
    """Newer ones, where the store refused those that the run came with; only the monitor's process can ask for them."""


class DrawingProcess:
    """The monitor's side. Concurrency: none. Blocking: `draw` waits for the process."""

    def __init__(self, run: RunDirectory, figures: Callable[[], LiveFigures]) -> None:
        """Start nothing yet.

        Args:
            run: Its directory; the process gets it with all that reaches the store.
            figures: Of this moment.
        """
        self._run, self._figures = run, figures
        self._process: subprocess.Popen[bytes] | None = None
        self._has_failed = False

    def draw(self) -> Iterator[Drawn]:
        """What the process draws.

        Raises:
            RuntimeError: Why it could not.
        """
        renewal = self._run.storage.renewal if self._has_failed else None
        request = _Request(self._figures(), renewal() if renewal else None)
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._started()
        assert self._process.stdin
        assert self._process.stdout
        try:
            _send(self._process.stdin, request)
            while (answer := pickle.load(self._process.stdout)) is not None:
                self._has_failed = isinstance(answer, str) or bool(answer.fault)
                if isinstance(answer, str):
                    raise RuntimeError(answer)
                yield answer
        except (OSError, EOFError) as error:
            self.close()
            raise RuntimeError("The process that draws this page ended; another one starts.") from error

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin
        assert process.stdout
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _started(self) -> subprocess.Popen[bytes]:
        command, environ = module_command(sys.executable, __name__), module_environ(os.environ)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
        assert process.stdin
        has_renewal = self._run.storage.renewal is not None
        storage = replace(self._run.storage, retry_seconds=STORE_SECONDS, renewal=None)
        _send(process.stdin, (replace(self._run, storage=storage), has_renewal))
        return process


def _send(pipe: Any, value: object) -> None:
    pickle.dump(value, pipe)
    pipe.flush()


def main() -> None:
    """Draw whenever figures come, until none do."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    with contextlib.suppress(EOFError, BrokenPipeError):
        _answer(sys.stdin.buffer, answers)


def _answer(requests: Any, answers: Any) -> None:
    from jobs.report.live.run_drawing import RunDrawing  # its imports have the priority of now

    run, has_renewal = pickle.load(requests)
    newest: list[_Request] = []
    if has_renewal:
        run = replace(run, storage=replace(run.storage, renewal=lambda: newest[-1].keys))
    drawing = RunDrawing(run, lambda: newest[-1].figures)
    while True:
        newest[:] = [pickle.load(requests)]
        try:
            for drawn in drawing.draw():
                _send(answers, drawn)
        except BrokenPipeError:
            raise
        except Exception as error:  # the monitor shows it, and asks again
            _send(answers, fault_text(error))
        else:
            _send(answers, None)


if __name__ == "__main__":
    main()
