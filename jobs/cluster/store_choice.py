"""The choice of a session's object store: the user's, as their environment names it, or the local stack's; never a mix.

What the shell names itself wins as a whole: an endpoint, a key, a profile. So does an AWS file that a variable names,
if its profile has an endpoint or keys. Everything else, such as `~/.aws` and a region, is ignored beside the local
stack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from jobs.cluster.key_renewal import KeyRenewal
from jobs.stack.record import Stack
from jobs.stack.services import REGION
from pipeline.access.proxies import Proxies
from pipeline.access.s3_options import S3Options
from pipeline.access.s3_settings import CHOOSING_VARIABLES, FILE_VARIABLES, RETRY_VARIABLES, refuse_aws_alone
from pipeline.errors import StorageError
from pipeline.store.storage import Storage

STACK_ORIGIN = "the local stack"
STORE_VARIABLE = "CONVMAE_STORE"
"""Of a job's own processes: its store, as JSON. Holds secrets, and is never in a runtime environment."""


def chosen_store(environ: Mapping[str, str], stack: Stack | None) -> Storage:
    """The store; what is wrong with the user's settings is reported when S3 is used.

    Args:
        environ: What the command was started with.
        stack: The local stack, if work goes to its cluster.
    """
    if given := environ.get(STORE_VARIABLE):
        return Storage.from_json(json.loads(given))
    try:
        found = Storage.from_environment(environ) if stack is None else _beside_stack(environ, stack)
    except StorageError as error:
        return Storage(fault=error, proxies=Proxies.from_environment(environ))
    return found if found.profile is None else replace(found, renewal=KeyRenewal.new())


def is_of_stack(storage: Storage, stack: Stack | None) -> bool:
    """Whether a store is the local stack's own."""
    return stack is not None and (storage.endpoint_url, storage.key) == (stack.endpoint, stack.settings.access_key)


def naming_variable(environ: Mapping[str, str]) -> str:
    """The variable by which the user's store is chosen."""
    return next((name for name in (*CHOOSING_VARIABLES, *FILE_VARIABLES) if environ.get(name)), "the environment")


def _beside_stack(environ: Mapping[str, str], stack: Stack) -> Storage:
    own = _of_stack(environ, stack)
    named = [name for name in CHOOSING_VARIABLES if environ.get(name)]
    if not named and not any(environ.get(name) for name in (*FILE_VARIABLES, *RETRY_VARIABLES)):
        return own
    found = Storage.from_environment(environ)
    if found.endpoint_url == own.endpoint_url and environ.get("AWS_ACCESS_KEY_ID", own.key) in ("", own.key):
        return own
    has_files = any(environ.get(name) for name in FILE_VARIABLES)
    if named or (has_files and not found.is_of_machines):
        return found
    refuse_aws_alone(found.client, stack.endpoint, dict(found.origins))
    return own


def _of_stack(environ: Mapping[str, str], stack: Stack) -> Storage:
    return Storage(
        stack.endpoint,
        stack.settings.access_key,
        stack.settings.secret_key,
        region=REGION,
        s3=S3Options.from_environment(environ),
        proxies=Proxies.from_environment(environ),
        origins=tuple((name, STACK_ORIGIN) for name in ("endpoint", "region", "credentials")),
    )
