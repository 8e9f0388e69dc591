"""The `convmae` command. Each command checks its input, calls one function, and prints what it did.

Exit codes: 0 done, 1 failed, 2 bad input (one line on standard error, nothing started, nothing left behind).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from jobs.commands import checkpoints, data, runs, stack
from jobs.errors import RunFailedError
from jobs.terminal import write_line
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
for part in (stack, data, runs, checkpoints):
    app.add_typer(part.app)


VERBOSE = "--verbose"


@app.callback()
def options(
    verbose: Annotated[
        bool, typer.Option(VERBOSE, help="Also show lines of Ray and of workers; may stand anywhere.")
    ] = False,
) -> None:
    """What all commands take."""
    if verbose:
        from jobs.session import VERBOSE_VARIABLE

        os.environ[VERBOSE_VARIABLE] = "1"


def main() -> None:
    """Entry point: bad input ends in one line and exit code 2, a failed run in one line and exit code 1."""
    from jobs.stack import StackError

    try:
        sys.exit(app(_verbose_first(sys.argv[1:]), standalone_mode=False) or 0)
    except TyperException as error:  # what Typer itself refuses: an unknown option, text where a number should be
        sys.stderr.write(_usage_text(error))
        sys.exit(2)
    except typer.Abort:
        sys.exit(1)
    except UserError as error:
        write_line(sys.stderr, f"error: {error}")
        sys.exit(2)
    except StackError as error:
        for line in f"failed: {error}".splitlines():  # the end of a service's log may follow
            write_line(sys.stderr, line)
        sys.exit(1)
    except (RunFailedError, OSError) as error:
        write_line(sys.stderr, f"failed: {error}")
        sys.exit(1)


def _verbose_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with --verbose before the command, wherever it was typed; not behind `--`, where names are."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, names = list(arguments[:end]), list(arguments[end:])
    if VERBOSE not in options:
        return [*options, *names]
    return [VERBOSE, *(option for option in options if option != VERBOSE), *names]


def _usage_text(error: Any) -> str:
    """One line; nothing where the help was printed, because the command was given nothing at all."""
    message: str = error.format_message()
    return f"error: {message}\n" if message else ""


if __name__ == "__main__":
    main()
