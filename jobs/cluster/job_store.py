"""The settings that a session sends to a job of the cluster: of its store, and of what else a run writes to.

Ray's dashboard shows a job's command line, metadata and environment, so none of them can hold a key. The settings go
into the cluster's key-value store, the way Ray's packages do, as a parcel under a name that cannot be guessed. The job
is given only this name, and takes the parcel out before it does anything else.
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
from jobs.cluster.store_choice import STORE_VARIABLE
from jobs.errors import ClusterError
from jobs.recipe.carried import carried_variables
from jobs.run.own_code import module_command

if TYPE_CHECKING:
    from jobs.cluster.session import Session

VARIABLE = "CONVMAE_STORE_PARCEL"
"""Of a job's environment: the parcel's name."""
SECONDS = 30.0


def send(session: Session, client: Any) -> dict[str, str]:
    """Send a session's settings; returns what the job's environment must have.

    The store's are not sent if the cluster's own are to be used: on the local stack, or if the caller has none.

    Args:
        session: Whose store.
        client: The cluster's job client.

    Raises:
        ClusterError: The cluster does not accept them.
        StorageError: There are no keys, or no such profile.
    """
    storage = session.storage
    if storage.fault:
        raise storage.fault
    is_sent = not (storage.is_of_machines or session.is_on_stack)
    parcel = {"store": storage.to_json() if is_sent else None, "variables": carried_variables(session.environ)}
    if not any(parcel.values()):
        return {}
    name = f"convmae-{secrets.token_hex(16)}.zip"
    status = put_package(client, name, json.dumps(parcel).encode())
    if status != 200:
        remedy = "look at the cluster with `convmae doctor`"
        raise ClusterError("RAY_ADDRESS", f"must take settings ({status})", session.cluster.text, remedy)
    return {VARIABLE: name}


def received(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a job's own processes, with the settings that were sent to it.

    A separate process takes them out, so that this one imports no Ray.

    Args:
        environ: Of the job.

    Raises:
        ClusterError: They did not arrive.
    """
    if not environ.get(VARIABLE):
        return dict(environ)
    command = module_command(sys.executable, "jobs.cluster.job_store")
    taking = subprocess.run(command, env=dict(environ), capture_output=True, text=True, check=False)
    if taking.returncode or not taking.stdout:
        why = (taking.stderr.strip().splitlines() or ["it is gone"])[-1]
        raise ClusterError(
            VARIABLE, f"must exist when the job starts ({why})", environ[VARIABLE], "submit the job again"
        )
    parcel = json.loads(taking.stdout)
    store = {STORE_VARIABLE: json.dumps(parcel["store"])} if parcel["store"] else {}
    return {**environ, **parcel["variables"], **store}


if __name__ == "__main__":
    sys.stdout.buffer.write(take_package(os.environ["RAY_ADDRESS"], os.environ[VARIABLE], SECONDS))
