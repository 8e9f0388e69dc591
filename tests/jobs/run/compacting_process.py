"""A process that compacts a run and kills itself at one of its writes and deletes: RUN_URL, which one, PARTS, ROWS."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from jobs.run import parts
from jobs.run.directory import RunDirectory
from pipeline.store.storage import Storage

_LOCK = threading.Lock()


def main() -> None:
    """Compact until there is nothing left to do."""
    url, at = sys.argv[1], int(sys.argv[2])
    parts.COMPACTED_PARTS, parts.FILE_ROWS = int(sys.argv[3]), int(sys.argv[4])
    number = itertools.count()

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            with _LOCK:  # deletes come from several threads
                if next(number) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return method(*arguments)

        return called

    for name in ("write", "create", "replace", "delete"):
        setattr(Storage, name, dying(getattr(Storage, name)))
    run = RunDirectory.at(Storage(), url)
    while run.compact(10**6, 0, lambda: True):
        pass


if __name__ == "__main__":
    main()
