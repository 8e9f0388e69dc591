"""The command that serves pages of runs."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from jobs.cli.completion import run_names
from jobs.cli.shared import AsJson, existing_run, open_session
from jobs.terminal import leave, print_json, say
from pipeline.errors import UserError

app = typer.Typer()

TOKEN_VARIABLE = "CONVMAE_UI_TOKEN"
LEAST_TOKEN = 16
"""Characters; what can be guessed protects nothing."""
LATE_SECONDS = 0.5
"""After which an interrupt is noticed at the latest."""


@app.command()
def ui(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Names of runs, or paths or URLs of their directories; default: all runs under the root.",
            autocompletion=run_names,
            show_default=False,
        ),
    ] = None,
    *,
    run_root: Annotated[
        str,
        typer.Option(
            "--run-root",
            "--root",
            help="URL or path that holds the runs; default: as for other commands.",
            show_default=False,
        ),
    ] = "",
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on; another one than loopback makes the page ask for a token."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")] = 0,
    token: Annotated[
        str,
        typer.Option(
            "--token",
            envvar=TOKEN_VARIABLE,
            help="What the page asks for; default: on loopback nothing, elsewhere one that is made up and printed.",
            show_default=False,
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Serve a page of several runs, live and ended ones, from their run directories; ends with Ctrl-C.

    It is kept up to date while it is open. What the store does not answer stays as it was, and is called old.
    """
    import time
    from dataclasses import replace

    from jobs.metrics.endpoint import served, url_of
    from jobs.report.live.live_parts import STORE_SECONDS
    from jobs.report.live.page_token import Guard, is_loopback, new_token, with_token
    from jobs.report.live.run_list import RunList, RunsUnder
    from jobs.report.live.runs_app import RunsApp

    check_token(token)
    session = open_session()
    named = [existing_run(session, name, run_root) for name in runs or ()]
    storage = replace(session.storage, retry_seconds=STORE_SECONDS)
    if named:
        chosen = [replace(run, storage=storage) for run in named]
        listed = RunList(lambda: chosen, "As given to `convmae ui`.")
    else:
        root = session.run_root(run_root)
        session.storage.check(root, write=False)
        session.remember_run_root(root)
        listed = RunList(RunsUnder(storage, root), f"Under {root}.")
    token = token or ("" if is_loopback(host) else new_token())
    guard = Guard(token, "`convmae ui` has printed the address that has it.")
    try:
        server = served(guard.protects(RunsApp(listed)), host, port)
    except OSError as error:
        rule = f"must be where this process can listen ({error.strerror or error})"
        raise UserError("--host, --port", rule, f"{host}:{port}", "choose others, or port 0 for any free one") from None
    url = with_token(url_of(host, server.server_port), token)
    with contextlib.suppress(KeyboardInterrupt):
        if as_json:
            print_json({"url": url, "runs": [run.url for run in listed.runs.values()]})
        else:
            say(f"{len(listed.runs)} runs: {url}")
        while True:
            time.sleep(LATE_SECONDS)  # an interrupt that comes right before a wait is noticed after it
    leave(0)  # threads may be drawing pages, or loading what draws them


def check_token(token: str) -> None:
    """Refuse a token that can be guessed, or that an address cannot hold.

    Raises:
        UserError: It is such a one; its value is not quoted.
    """
    is_plain = all(char.isascii() and (char.isalnum() or char in "-_") for char in token)
    if token and (len(token) < LEAST_TOKEN or not is_plain):
        rule = f"must be at least {LEAST_TOKEN} letters, digits, '-' or '_'"
        remedy = "leave it out: one is made up and printed"
        raise UserError("--token", rule, f"{len(token)} characters", remedy)
