"""A `convmae` command that counts its requests of storage, and writes their number to the file named first."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.store.storage import Storage


def counted() -> Iterator[int]:
    """Count the requests from now on; the next number is how many there were."""
    requests, attempt = itertools.count(), Storage.attempt

    def counting(storage: Storage, url: str, call: Callable[[Any, str], Any]) -> Any:
        next(requests)
        return attempt(storage, url, call)

    Storage.attempt = counting  # type: ignore[method-assign,assignment]
    return requests


def main() -> None:
    """Run it."""
    _, path, *arguments = sys.argv
    requests = counted()
    sys.argv = ["convmae", *arguments]
    from jobs.cli.main import main as convmae

    try:
        convmae()
    finally:
        Path(path).write_text(json.dumps({"requests": next(requests)}))


if __name__ == "__main__":
    main()
