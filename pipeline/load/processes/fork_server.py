"""A process that has imported what loader processes need, and forks them, each within milliseconds.

A rank cannot fork them: CUDA, gloo and the threads of its store clients do not survive that. Starting each anew takes
seconds for its imports, and 150 MB. So one process is started anew, imports, starts no thread, opens no connection,
and is forked: `multiprocessing`'s fork server in principle. That one is global to its process, imports the rank's
`__main__` again, and lets its children live on when the parent is killed.

    rank  --socket-->  fork server  --fork-->  loader processes  <--line-->  rank

Loader processes end with their server (PR_SET_PDEATHSIG), and this with the rank, whose end closes the socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

START_SECONDS = 120.0
"""For imports, on a machine that has other work."""
FORK_SECONDS = 20.0
END_SECONDS = 5.0
_LONGEST_BYTES = 4096
_PR_SET_PDEATHSIG = 1
_LOADER = "import sys; sys.path[:] = sys.argv[2:]; from {0} import serve; serve(int(sys.argv[1]))"
_MODULES = ("torch", "pipeline.load.processes.part_maker")
"""Torch resizes images."""
_CLIENTS = ("s3fs", "aiobotocore.session", "obstore", "gcsfs", "adlfs")
"""Of stores; imported if the rank has them."""


class ForkServer:
    """The rank's side.

    Owns: the server and, with it, its children; all end with close().
    Concurrency: none.
    Failure: OSError where it does not answer, as when it was killed; then make another one.
    """

    def __init__(self) -> None:
        """Start it; returns at once."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            handle = theirs.fileno()
            path = [entry or str(Path.cwd()) for entry in sys.path]  # where the rank finds its code
            command = [sys.executable, "-c", _LOADER.format(__name__), str(handle), *path]
            # A loader process decodes one image at a time; threads before a fork would be lost in it.
            environ = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            # Its own session, so that a terminal's Ctrl-C reaches the rank alone, which ends it in order.
            self._process = subprocess.Popen(
                command, pass_fds=[handle], stdin=subprocess.DEVNULL, env=environ, start_new_session=True
            )
        self._socket = ours
        self._socket.settimeout(START_SECONDS)
        self._send({"modules": [*_MODULES, *(name for name in _CLIENTS if name in sys.modules)]})

    def fork(self, line: int, previous: int) -> tuple[int, str]:
        """Start a loader process.

        Args:
            line: Its end of the connection to the rank; a file descriptor, which stays the caller's.
            previous: Pid of a dead one that it replaces; 0: none.

        Returns:
            Its pid, and how the previous one ended.
        """
        self._send({"previous": previous}, line)
        reply = self._socket.recv(_LONGEST_BYTES)
        if not reply:
            raise ConnectionResetError("the fork server has ended")
        self._socket.settimeout(FORK_SECONDS)
        pid, ended = json.loads(reply)
        return pid, ended

    def close(self) -> None:
        """End it and its children, at once."""
        self._socket.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:  # it was stopped; its children end with it
            self._process.kill()
            self._process.wait()

    def _send(self, request: dict[str, object], *handles: int) -> None:
        socket.send_fds(self._socket, [json.dumps(request).encode()], handles)


def serve(handle: int) -> None:
    """The server: import, then fork a loader process for each request, until the rank is gone.

    Args:
        handle: Of its end of the socket.
    """
    with socket.socket(fileno=handle) as control:
        for name in json.loads(control.recv(_LONGEST_BYTES) or "{}").get("modules", []):
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # else the first collection in a child would copy every page that an object lies in
        children: set[int] = set()
        try:
            while True:
                request, handles, _, _ = socket.recv_fds(control, _LONGEST_BYTES, 1)
                if not request:
                    break
                previous = json.loads(request)["previous"]
                ended = _end(previous) if previous in children else "ended with its server"
                children.discard(previous)
                pid = _forked(control, handles[0])
                children.add(pid)
                os.close(handles[0])
                control.send(json.dumps([pid, ended]).encode())
        except ConnectionError:
            pass
        for child in children:
            _end(child)


def _forked(control: socket.socket, line: int) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        control.close()
        if os.getppid() == server:
            from pipeline.load.processes.part_maker import make_parts

            make_parts(Connection(line))
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _end(pid: int) -> str:
    """Kill a child, if it is not dead; returns how it ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
