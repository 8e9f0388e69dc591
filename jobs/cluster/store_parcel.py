"""How a session reaches its store, on its way to a job of the cluster.

A job's command line, metadata and environment are shown by Ray's dashboard, so none of them can hold a key. The parcel
goes into the cluster's key-value store, by the door through which Ray's packages come, under a name that nobody guesses
and that is all the job is told. The job takes it out before it does anything else.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.cluster.ray_internals.core import put_package, take_package
from jobs.errors import ClusterError
from jobs.run.own_code import module_command

if TYPE_CHECKING:
    from jobs.cluster.session import Session

VARIABLE = "CONVMAE_STORE_PARCEL"
"""Of a job's environment: the parcel's name."""
STORE_VARIABLE = "CONVMAE_STORE"
"""Of a job's own processes: what was in it, as JSON. Holds secrets, and is never in a runtime environment."""
SECONDS = 30.0


def send(session: Session, client: Any) -> dict[str, str]:
    """Put a session's store on its way; returns what the job's environment must have.

    Nothing travels where the cluster's own settings are meant: the local stack's, or where the caller has none.

    Args:
        session: Whose store.
        client: Of the cluster, for jobs.

    Raises:
        ClusterError: The cluster does not take it.
        StorageError: There are no keys, or no such profile.
    """
    storage = session.storage
    if storage.fault:
        raise storage.fault
    if storage.is_of_machines or session.is_on_stack:
        return {}
    name = f"convmae-{secrets.token_hex(16)}.zip"
    status = put_package(client, name, json.dumps(storage.to_json()).encode())
    if status != 200:
        remedy = "look at the cluster with `convmae doctor`"
        raise ClusterError("RAY_ADDRESS", f"must take settings ({status})", session.cluster.text, remedy)
    return {VARIABLE: name}


def received(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job's own processes, with what came for it; asks a process of its own, to import no Ray.

    Args:
        environ: Of the job.

    Raises:
        ClusterError: It did not come.
    """
    if not environ.get(VARIABLE):
        return dict(environ)
    command = module_command(sys.executable, "jobs.cluster.store_parcel")
    taking = subprocess.run(command, env=dict(environ), capture_output=True, text=True, check=False)
    if taking.returncode or not taking.stdout:
        why = (taking.stderr.strip().splitlines() or ["it is gone"])[-1]
        raise ClusterError(VARIABLE, f"must be there for the job ({why})", environ[VARIABLE], "submit it again")
    return {**environ, STORE_VARIABLE: taking.stdout}


if __name__ == "__main__":
    sys.stdout.buffer.write(take_package(os.environ["RAY_ADDRESS"], os.environ[VARIABLE], SECONDS))
