"""A `convmae` command that counts its requests of storage, and writes their number to the file named first."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.store.storage import Storage


def main() -> None:
    """Run it."""
    _, path, *arguments = sys.argv
    requests, attempt = itertools.count(), Storage.attempt

    def counted(storage: Storage, url: str, call: Callable[[Any, str], Any]) -> Any:
        next(requests)
        return attempt(storage, url, call)

    Storage.attempt = counted  # type: ignore[method-assign,assignment]
    sys.argv = ["convmae", *arguments]
    from jobs.cli.main import main as convmae

    try:
        convmae()
    finally:
        Path(path).write_text(json.dumps({"requests": next(requests)}))


if __name__ == "__main__":
    main()
