"""The default run root: CONVMAE_RUN_ROOT, else the one last used with the same cluster.

It is remembered in the user's state folder, since a shell's cluster does not depend on the current folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from pipeline.store.json_text import parsed_object

logger = logging.getLogger(__name__)

VARIABLE = "CONVMAE_RUN_ROOT"
_FILE = "run-roots.json"
_MOST = 100
"""Clusters that are remembered; the oldest are dropped first."""


def state_folder(environ: Mapping[str, str]) -> Path:
    """Where this user's programs keep what they remember, by the XDG base directory specification.

    Nothing is remembered for a user who has neither HOME nor a name, as in some containers.
    """
    given = environ.get("XDG_STATE_HOME", "")
    if given.startswith("/"):
        return Path(given, "convmae")
    try:
        return Path.home() / ".local" / "state" / "convmae"
    except RuntimeError:
        return Path(os.devnull, "convmae")


def remembered(folder: Path, address: str) -> str:
    """The run root last used with a cluster; empty if there is none."""
    return _read(folder).get(address, "")


def remember(folder: Path, address: str, run_root: str) -> None:
    """Remember the run root of a cluster; a folder that cannot be written is no error."""
    known = _read(folder)
    if known.get(address) == run_root:
        return
    known.pop(address, None)
    known[address] = run_root
    recent = dict(list(known.items())[-_MOST:])
    part = folder / f"{_FILE}.{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(recent, indent=1) + "\n", "utf-8")
        part.replace(folder / _FILE)
    except OSError as error:
        logger.debug("the run root is not remembered: %s", error)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, str]:
    try:
        known = parsed_object((folder / _FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return {address: root for address, root in known.items() if isinstance(root, str) and root}
