"""s3fs as it is used here: our own retries, the options of every request, and credentials that may be late.

Credentials come from the value that the caller gave, or from botocore's own chain in each process: environment,
profile files, web identity, the container's and the instance's endpoint. The chain's temporary ones are renewed by
botocore before they expire. What it does not do is look again where it found nothing, or where the store refused what
it found: that takes a new file system (pipeline.file_systems).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

from aiobotocore.session import AioSession
from botocore import exceptions as boto

from pipeline.s3_options import S3Options
from pipeline.store_urls import kind_of

CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 30.0
MAX_CONNECTIONS = 64

Source = Literal["given", "process", "machine"]
"""Of credentials: the value that travels, this process's chain, or that chain without environment variables."""


def sources(key: str | None, token: str | None) -> tuple[Source, ...]:
    """Where to look for credentials, again and again in this order while the store refuses them.

    Keys without a session token do not expire, and stay what they are. A token does, and whoever gave it may be gone
    by then: what this process finds by itself comes next, and, since the environment of a process never changes, after
    that what its machine has.
    """
    if key is None:
        return ("process",)
    return ("given",) if token is None else ("given", "process", "machine")


def open_s3(
    *,
    endpoint_url: str | None,
    key: str | None,
    secret: str | None,
    token: str | None,
    region: str | None,
    options: S3Options,
    patience_seconds: float,
    source: Source,
) -> Any:
    """An `s3fs.S3FileSystem` of its own; connects to nothing yet.

    Args:
        endpoint_url: None leaves it to botocore.
        key: Access key id; with `source` given.
        secret: What belongs to it.
        token: Of temporary keys.
        region: None leaves it to botocore.
        options: For every request.
        patience_seconds: How long all attempts of one call may take.
        source: Of the credentials.
    """
    given = {"key": key, "secret": secret, "token": token} if source == "given" else {}
    filesystem = _exact_kind()(
        endpoint_url=endpoint_url,
        **given,
        session=_Session(with_environment=source != "machine"),
        requester_pays=options.requester_pays,
        s3_additional_kwargs=options.call_arguments,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "read_timeout": min(READ_TIMEOUT_SECONDS, max(CONNECT_TIMEOUT_SECONDS, patience_seconds)),
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": MAX_CONNECTIONS,
            **options.client_settings,
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    filesystem.retries = 1  # one attempt inside s3fs too: our deadline rules
    return filesystem


@functools.cache
def _exact_kind() -> Any:
    class ExactS3(kind_of("s3")):  # type: ignore[misc]
        """s3fs for which a path is a bucket and a key, and nothing in the key means anything.

        s3fs itself takes `?versionId=` and what follows from a key, so that another object is read, or deleted.
        """

        def split_path(self, path: str) -> tuple[str, str, None]:
            """Bucket and key; no version."""
            bucket, key = self._find_bucket_key(path.removeprefix("s3://").removeprefix("s3a://"))
            return bucket, key, None

    return ExactS3


class _Session(AioSession):  # type: ignore[misc]
    """A session that says of whatever goes wrong with finding credentials that it is about credentials.

    Else a token file that is not there yet looks like an object that is not there.
    """

    def __init__(self, *, with_environment: bool) -> None:
        super().__init__()
        self._with_environment = with_environment

    async def get_credentials(self) -> Any:
        """What the chain finds; None where it finds nothing."""
        with _about_credentials("chain"):
            if not self._with_environment:
                self.get_component("credential_provider").remove("env")
            found = await super().get_credentials()
        return found and _Credentials(found)


class _Credentials:
    """What a session found, and how it is renewed."""

    def __init__(self, found: Any) -> None:
        self._found = found

    async def get_frozen_credentials(self) -> Any:
        """Keys for one request, renewed if they are about to expire."""
        with _about_credentials(self._found.method):
            return await self._found.get_frozen_credentials()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)


@contextlib.contextmanager
def _about_credentials(provider: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise boto.CredentialRetrievalError(provider=provider, error_msg=told) from error
