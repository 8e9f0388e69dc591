"""Completion of run names in a shell: what `convmae status b<Tab>` offers.

The shell stands still meanwhile. So the store is asked once, for names alone, and not for long; whatever goes wrong,
nothing is offered, and nothing is written that would end up in the line that is being typed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
from collections.abc import Mapping

import typer

VARIABLE = "_CONVMAE_COMPLETE"
"""Set by the shell's script where a line is to be completed, not run; Typer names it so."""
PATIENCE_SECONDS = 2.0


def completes(environ: Mapping[str, str]) -> bool:
    """Whether this process was started to complete a line."""
    return VARIABLE in environ


def run_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names under the run root that begin with `incomplete`; none where they are not there in time."""
    logging.disable()
    found: list[str] = []

    def look() -> None:
        with contextlib.suppress(Exception):
            found.extend(_listed(str(ctx.params.get("run_root") or ""), incomplete))

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        looking = threading.Thread(target=look, name="convmae-completion", daemon=True)
        looking.start()
        looking.join(PATIENCE_SECONDS)
    return list(found)


def _listed(run_root: str, incomplete: str) -> list[str]:
    from jobs.cluster.session import Session
    from jobs.run.directory import RUN_NAME

    session = Session.open(os.environ)
    names = session.storage.list_names(session.run_root(run_root))
    return sorted(name for name in names if name.startswith(incomplete) and RUN_NAME.fullmatch(name))
