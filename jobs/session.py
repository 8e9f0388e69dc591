"""Where commands work: the cluster that RAY_ADDRESS names, or the local stack; and whose object store.

A variable that the caller has set wins over the local stack's: `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID` ... lead to the
user's own store, `RAY_ADDRESS` to the user's own cluster.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.errors import ClusterError
from jobs.run_directory import RunDirectory
from jobs.stack import Stack
from pipeline.errors import UserError
from pipeline.storage import Storage

NAMESPACE = "convmae"
HOME_VARIABLE = "CONVMAE_HOME"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a submitted job."""
CONNECT_SECONDS = 5.0
PROJECT = Path(__file__).resolve().parent.parent


def home_folder(environ: Mapping[str, str]) -> Path:
    """The local stack's folder: $CONVMAE_HOME, or `.convmae` in the current folder."""
    return Path(environ.get(HOME_VARIABLE) or ".convmae").absolute()


@dataclass(frozen=True)
class Session:
    """What one command was started with."""

    environ: Mapping[str, str]
    home: Path
    stack: Stack | None
    storage: Storage

    @classmethod
    def open(cls, environ: Mapping[str, str]) -> Session:
        """Find the local stack, if it is up, and the object store; connects to nothing."""
        home = home_folder(environ)
        stack = Stack.load(home)
        local = stack.environment() if stack else {}
        if "RAY_ADDRESS" in environ and environ["RAY_ADDRESS"] != local.get("RAY_ADDRESS"):
            local = {key: value for key, value in local.items() if not key.startswith("RAY_")}
        merged = {**local, **environ}
        return cls(merged, home, stack, Storage.from_environment(merged))

    @property
    def is_local(self) -> bool:
        """Whether work goes to the local stack's own cluster."""
        return self.stack is not None and self.environ["RAY_ADDRESS"] == self.stack.environment()["RAY_ADDRESS"]

    def run_root(self, recipe_run_root: str = "") -> str:
        """The URL under which runs are kept.

        Raises:
            UserError: If the recipe names none and the local stack is not up.
        """
        if recipe_run_root:
            return recipe_run_root
        if self.stack is None:
            remedy = "give run_root=URL, or start the local stack with `convmae up`"
            raise UserError("run_root", "must be a URL when the local stack is not up", "", remedy)
        return f"s3://{self.stack.bucket}/runs"

    def run(self, name: str, run_root: str = "") -> RunDirectory:
        """The directory of a run by name, or by its whole URL."""
        if "://" in name:
            root, _, name = name.rstrip("/").rpartition("/")
            return RunDirectory.of(self.storage, root, name)
        return RunDirectory.of(self.storage, self.run_root(run_root), name)

    def export(self) -> None:
        """Put the session's variables where Ray finds them: in the process environment, before Ray is imported."""
        os.environ.update({key: value for key, value in self.environ.items() if key.startswith("RAY_")})

    def connect(self) -> None:
        """Connect this process to the Ray cluster.

        Raises:
            ClusterError: If there is none, or it does not answer.
        """
        if "RAY_ADDRESS" not in self.environ:
            remedy = "start the local stack with `convmae up`, or set RAY_ADDRESS=HOST:PORT"
            raise ClusterError("RAY_ADDRESS", "must name a cluster when the local stack is not up", "", remedy)
        address = self.environ["RAY_ADDRESS"]
        check_answers(address)
        import ray

        try:
            ray.init(
                address,
                namespace=NAMESPACE,
                logging_level=logging.ERROR,
                log_to_driver=not sys.stdout.isatty(),  # a terminal shows the progress bar, a log what workers say
                runtime_env=self.runtime_env(),
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            remedy = "is it up? `convmae up` starts a local one"
            raise ClusterError("RAY_ADDRESS", f"must answer ({_first_line(error)})", address, remedy) from error

    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment: on a cluster of other machines, the project's code travels along.

        The driver of a submitted job has it from the job already, and Ray refuses to be given it twice.
        """
        if self.is_local or JOB_VARIABLE in self.environ or not (PROJECT / "pyproject.toml").exists():
            return {}
        return {"working_dir": str(PROJECT)}


def check_answers(address: str) -> None:
    """Find out in seconds that nobody listens; `ray.init` would try for minutes.

    Raises:
        ClusterError: If nobody does.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if not parts.hostname or not parts.port:  # "auto": Ray looks for a cluster on this machine
        return
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        remedy = "is it up? `convmae up` starts a local one"
        raise ClusterError("RAY_ADDRESS", f"must answer ({error})", address, remedy) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
