"""The job of a command that was typed elsewhere: the same command, with its output as frames in the job's log.

The job's environment holds what the command would have seen where it was typed: whether it prints to a terminal and how
wide that is, the caller's run root, and the small files that the command names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from jobs.cluster import job_store
from jobs.errors import ClusterError
from jobs.remote.frames import CALLER_VARIABLE, FrameStream, FrameWriter
from pipeline.host.scratch import scratch_folder


def run_command(arguments: list[str], caller: Mapping[str, object], writer: FrameWriter) -> int:
    """Run `convmae ARGUMENTS` in this process; returns its exit code.

    Args:
        arguments: The command's.
        caller: `terminals`, the streams that are terminals; `files`, name and content of each small file.
        writer: Takes its output.
    """
    terminals = caller["terminals"]
    assert isinstance(terminals, list)
    sys.stdout = FrameStream(writer, "out", is_terminal="out" in terminals)
    sys.stderr = FrameStream(writer, "err", is_terminal="err" in terminals)
    sys.argv = ["convmae", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever handler Ray was started with
    try:
        os.environ.update(job_store.received(os.environ))
        from jobs.cli import main as convmae

        convmae.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except ClusterError as error:  # the store's settings did not arrive; the command reports all other errors itself
        sys.stderr.write(f"failed: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Entry point of the job."""
    writer = FrameWriter(sys.stdout)
    caller = json.loads(os.environ[CALLER_VARIABLE])
    with scratch_folder() as folder:
        for name, content in caller["files"].items():
            Path(folder, name).write_text(content, "utf-8")
        os.chdir(folder)
        code = run_command(sys.argv[1:], caller, writer)
    writer.exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
