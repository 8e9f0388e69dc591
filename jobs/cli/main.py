"""The `convmae` command: its help, its exit codes, and its errors as single lines.

Exit codes: 0 done, 1 failed, 2 bad input (one line on standard error, nothing started, nothing left behind).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from jobs.cli import ablation, checkpoints, data, evaluation, pages, runs, simulation, stack
from jobs.cli.completion import completes
from jobs.errors import RunFailedError
from jobs.terminal import close_streams, has_reader, leave, open_streams, write_line
from pipeline.errors import UserError

app = typer.Typer(
    name="convmae",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Pretrain ConvMAE: photographs → WebDataset shards → Ray + DeepSpeed → one checkpoint.

On one machine, from nothing: `convmae up`, `convmae shard PHOTOS s3://convmae/datasets/mine`,
`convmae submit tiny data=s3://convmae/datasets/mine --run first --follow`, `convmae report first`, `convmae down`.

On a cluster, set RAY_ADDRESS and the AWS_* variables; the commands are the same.""",
)
for part in (stack, data, simulation, runs, pages, checkpoints, evaluation, ablation):
    app.add_typer(part.app)


VERBOSE = "--verbose"


@app.callback()
def options(
    verbose: Annotated[
        bool, typer.Option(VERBOSE, help="Also show the lines of Ray and of workers. May be given anywhere.")
    ] = False,
) -> None:
    """Options of all commands."""
    if verbose:
        from jobs.cluster.session import VERBOSE_VARIABLE

        os.environ[VERBOSE_VARIABLE] = "1"
    try:
        Path.cwd()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError("current folder", f"must exist ({reason})", "", "change to another one with `cd`") from None


def main() -> None:
    """Entry point: bad input ends in one line and exit code 2, a failed run in one line and exit code 1."""
    open_streams()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # about folders that it cannot write
    code = _run(sys.argv[1:])
    if completes(os.environ):
        leave(code)
    sys.exit(code if close_streams() else code or 1)


def _run(arguments: Sequence[str]) -> int:
    """Run a command; returns its exit code. Errors are reported on standard error."""
    from jobs.stack.local_stack import StackError

    try:
        return int(app(verbose_first(arguments), standalone_mode=False) or 0)
    except SystemExit as ended:  # from a command that sets its exit code
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except (typer.Abort, KeyboardInterrupt):
        return 1
    except (TyperException, UserError) as error:  # Typer refuses unknown options, or text for a number
        _tell(_usage_text(error) if isinstance(error, TyperException) else f"error: {error}")
        return 2
    except (RunFailedError, StackError, OSError) as error:
        if not isinstance(error, BrokenPipeError) or has_reader(sys.stdout):
            for line in f"failed: {error}".splitlines():  # the tail of a service's log may follow
                _tell(line)
        return 1


def _tell(line: str) -> None:
    """Write one line to standard error, if there is one and it is open."""
    if line:
        with contextlib.suppress(OSError):
            write_line(sys.stderr, line)


def verbose_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with --verbose moved to the front; after `--` there are names, which stay as they are."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, names = list(arguments[:end]), list(arguments[end:])
    if VERBOSE not in options:
        return [*options, *names]
    return [VERBOSE, *(option for option in options if option != VERBOSE), *names]


def _usage_text(error: Any) -> str:
    """One line; empty if the help was printed because no arguments were given."""
    message: str = error.format_message()
    return f"error: {message}" if message else ""


if __name__ == "__main__":
    main()
