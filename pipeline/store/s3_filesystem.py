"""s3fs as it is used here: our own retries, the options of every request, and credentials that may be late.

A client is made of a StoreAccess alone, whatever the process's own variables and files say. Credentials are those that
the caller gave. Where it gave none, a process finds its own by botocore's chain: environment, profile files, web
identity, the container's and the instance's endpoint. Temporary ones are renewed by botocore before they expire. What
it does not do is look again where it found nothing, or where the store refused what it found: that takes a new file
system (pipeline.store.file_systems).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from aiobotocore.credentials import AioCredentials
from botocore import exceptions as boto
from botocore.credentials import ReadOnlyCredentials

from pipeline.access.aws_session import PlainSession, ProcessSession, configured_endpoint
from pipeline.access.profile_keys import Keys, ProfileKeys, ProfileKeysError
from pipeline.access.store_access import StoreAccess
from pipeline.access.urls import kind_of
from pipeline.store.obstore_bodies import ObstoreBodies, open_bodies

CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 30.0
MAX_CONNECTIONS = 64
_OF_A_ROLE = ("iam-role", "container-role", "assume-role-with-web-identity")

Source = Literal["given", "profile", "renewed", "process", "machine"]
"""Of credentials: the keys that travel, the caller's profile, what the caller has now, this process's chain, or that
chain without environment variables."""


def sources(storage: StoreAccess) -> tuple[Source, ...]:
    """Places to look for credentials, again and again in this order while the store refuses them.

    Keys without a session token do not expire, and stay what they are. A token does. Whoever gave it may have a newer
    one, and may be gone by then: what this process finds by itself comes next, and, since the environment of a process
    never changes, after that what its machine has.
    """
    given: tuple[Source, ...] = ("given",) if storage.key is not None else ()
    if storage.profile is not None:
        return (*given, "profile")
    renewed: tuple[Source, ...] = ("renewed",) if storage.renewal is not None else ()
    own: tuple[Source, ...] = ("process", "machine") if storage.token is not None else ()
    if storage.key is None:
        return ("process",)
    return (*given, *renewed, *(step for source in own for step in (source, *renewed)))


def open_s3(storage: StoreAccess, renewals: int) -> Any:
    """An `s3fs.S3FileSystem` of its own; connects to nothing yet.

    Args:
        storage: Whose settings, and how long all attempts of one call may take.
        renewals: How often credentials were refused before.

    Raises:
        StorageError: A proxy that is not one, or a setting that `CONVMAE_S3_READER` does not go with.
    """
    order = sources(storage)
    source = order[renewals % len(order)]
    keys, session = _keys_of(storage, source, is_renewed=renewals > 0)
    settings = {**dict(storage.client), **_dotted(storage.s3.client_settings)}
    endpoint = storage.endpoint_url or f"https://s3.{storage.region}.amazonaws.com"
    proxies = storage.proxies_here.for_endpoint(endpoint)
    read_timeout_seconds = min(READ_TIMEOUT_SECONDS, max(CONNECT_TIMEOUT_SECONDS, storage.retry_seconds))
    bodies = open_bodies(
        storage,
        proxy=proxies.get("http"),
        connect_timeout_seconds=CONNECT_TIMEOUT_SECONDS,
        read_timeout_seconds=read_timeout_seconds,
    )
    filesystem = _exact_kind()(
        endpoint_url=storage.endpoint_url,
        **({"key": keys.key, "secret": keys.secret, "token": keys.token} if keys else {}),
        session=session,
        requester_pays=storage.s3.requester_pays,
        s3_additional_kwargs=storage.s3.call_arguments,
        client_kwargs={"region_name": storage.region, **_verify(storage.ca_bundle)},
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "read_timeout": read_timeout_seconds,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": MAX_CONNECTIONS,
            "proxies": proxies,
            **_nested(settings),
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    filesystem.retries = 1  # one attempt inside s3fs too: our deadline rules
    filesystem.bodies = bodies
    return filesystem


def _keys_of(storage: StoreAccess, source: Source, *, is_renewed: bool) -> tuple[Keys | None, _Session]:
    """Keys to pass on, or the session that finds them."""
    given = Keys(str(storage.key), str(storage.secret), storage.token)
    if source == "given":
        return given, _Session()
    if source == "profile":
        assert storage.profile
        if is_renewed:
            storage.profile.forget()
        return None, _Session(_ProfileCredentials(storage.profile))
    if source == "renewed":
        assert storage.renewal
        return storage.renewal() or given, _Session()
    return None, _Session(_Chain(storage.endpoint_url, with_environment=source == "process"))


def _dotted(settings: dict[str, Any]) -> dict[str, Any]:
    return {f"s3.{name}": value for name, value in settings.get("s3", {}).items()}


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for botocore's configuration of a client, by dotted names."""
    of_s3 = {name.removeprefix("s3."): value for name, value in settings.items() if name.startswith("s3.")}
    others = {name: value for name, value in settings.items() if not name.startswith("s3.")}
    return {**others, **({"s3": of_s3} if of_s3 else {})}


def _verify(ca_bundle: str | None) -> dict[str, Any]:
    """The caller's certificates; where that file is not, what this machine trusts."""
    found = ca_bundle if ca_bundle and Path(ca_bundle).is_file() else os.environ.get("AWS_CA_BUNDLE")
    return {"verify": found} if found else {}


@functools.cache
def _exact_kind() -> Any:
    class ExactS3(kind_of("s3")):  # type: ignore[misc]
        """s3fs for which a path is a bucket and a key, and nothing in the key means anything.

        s3fs itself takes `?versionId=` and what follows from a key, so that another object is read, or deleted.
        """

        bodies: ObstoreBodies | None

        def split_path(self, path: str) -> tuple[str, str, None]:
            """Bucket and key; no version."""
            bucket, key = self._find_bucket_key(path.removeprefix("s3://").removeprefix("s3a://"))
            return bucket, key, None

    return ExactS3


class _Session(PlainSession):
    """A session that reports every fault in finding credentials as one of credentials.

    Otherwise a token file that is not there yet would look like a missing object.
    """

    def __init__(self, finds: _Chain | _ProfileCredentials | None = None) -> None:
        super().__init__()
        self._finds = finds

    async def get_credentials(self) -> Any:
        """The credentials that are found; None where there are none."""
        return await self._finds.load() if self._finds else None


class _ProfileCredentials(AioCredentials):  # type: ignore[misc]
    """Keys of a profile of this machine, as aiobotocore asks for them."""

    def __init__(self, profile: ProfileKeys) -> None:
        super().__init__("", "", method="profile")
        self._profile = profile

    async def load(self) -> _ProfileCredentials:
        """Itself, with keys."""
        await self.get_frozen_credentials()
        return self

    async def get_frozen_credentials(self) -> Any:
        """Keys for one request, renewed if they are about to expire."""
        keys = await asyncio.to_thread(self._profile.now)
        return ReadOnlyCredentials(keys.key, keys.secret, keys.token)


class _Chain:
    """The chain by which a process finds keys by itself, for one endpoint."""

    def __init__(self, endpoint_url: str | None, *, with_environment: bool) -> None:
        self._endpoint_url = endpoint_url
        self._with_environment = with_environment

    async def load(self) -> _Credentials | None:
        """The keys that the chain finds; those that belong to another endpoint are not sent to this one."""
        with _about_credentials("chain"):
            session = ProcessSession(os.environ)
            if not self._with_environment:
                session.get_component("credential_provider").remove("env")
            found = await session.get_credentials()
            own = configured_endpoint(session)
        is_of_a_role = found is None or found.method in _OF_A_ROLE
        if own and not is_of_a_role and own.rstrip("/") != (self._endpoint_url or "").rstrip("/"):
            why = f"those of this process belong to {own}, not to {self._endpoint_url or 'AWS'}"
            raise boto.CredentialRetrievalError(provider=found.method, error_msg=why)
        return found and _Credentials(found)


class _Credentials:
    """Credentials that a session found, and renews."""

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
    except ProfileKeysError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise boto.CredentialRetrievalError(provider=provider, error_msg=why) from error
