"""Access to stores as one complete, picklable value, looked up once where a command is typed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from pipeline.access import faults, s3_settings
from pipeline.access.profile_keys import Keys, ProfileKeys, ProfileKeysError
from pipeline.access.proxies import Proxies
from pipeline.access.s3_options import S3Options
from pipeline.access.s3_settings import DEFAULT_REGION
from pipeline.errors import StorageError


@dataclass(frozen=True)
class StoreAccess:
    """All that decides which store a URL means, and with whose rights.

    No process that gets it looks at its own variables and files, so that all of them work on the same store. Only keys
    may be left to each machine: where there are none here, every process finds those of its role, and renews them. Keys
    that a profile makes on this machine alone are pickled as they are at that moment (s3_filesystem).
    """

    endpoint_url: str | None = None
    """S3 endpoint; None: AWS's own."""
    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    region: str = DEFAULT_REGION
    retry_seconds: float = 120.0
    """Long enough for a storage server to be restarted, or for credentials to come."""
    s3: S3Options = field(default_factory=S3Options)
    """Options of every request to S3."""
    client: tuple[tuple[str, Any], ...] = ()
    """Settings of botocore's client by name, as `s3.use_accelerate_endpoint`."""
    ca_bundle: str | None = None
    """File with the certificates of authorities; None, or not there: those of the machine."""
    proxies: Proxies = field(default_factory=Proxies)
    """Of whoever typed the command; without any, each process has its own."""
    profile: ProfileKeys | None = None
    """What has, or makes, keys on this machine."""
    renewal: Callable[[], Keys | None] | None = field(default=None, repr=False, compare=False)
    """Asks whoever typed the command for newer keys, once those that came with it were refused."""
    fault: StorageError | None = field(default=None, repr=False)
    """Why S3 cannot be used with the environment's settings; raised when it would be."""
    origins: tuple[tuple[str, str], ...] = field(default=(), repr=False, compare=False)
    """Where each setting comes from, for people."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Look up all that an environment says, by botocore's own chain, and S3Options and proxies.

        Raises:
            StorageError: A profile, file or value that cannot be used.
        """
        found = s3_settings.resolve(environ)
        return cls(
            endpoint_url=found.endpoint_url,
            key=found.key,
            secret=found.secret,
            token=found.token,
            region=found.region,
            s3=S3Options.from_environment(environ),
            client=found.client,
            ca_bundle=found.ca_bundle,
            proxies=Proxies.from_environment(environ),
            profile=found.profile,
            origins=found.origins,
        )

    @property
    def is_of_machines(self) -> bool:
        """Whether it names neither a store nor keys, so that each machine's own apply."""
        return not (self.endpoint_url or self.key or self.profile or self.fault)

    @property
    def proxies_here(self) -> Proxies:
        """The proxies that this process uses."""
        return self.proxies if self.proxies.are_named else Proxies.from_environment(os.environ)

    def for_others(self) -> Self:
        """The same for a process that cannot ask this machine's profile: with the keys that it has now.

        Raises:
            StorageError: It has none.
        """
        if self.profile is None:
            return self
        try:
            keys = self.profile.now()
        except ProfileKeysError as error:
            raise faults.translated(error, "s3://") from error
        return replace(self, key=keys.key, secret=keys.secret, token=keys.token, profile=None)

    def __getstate__(self) -> dict[str, Any]:
        return self.for_others().__dict__

    def to_json(self) -> dict[str, Any]:
        """Its fields, for a process that reads them as JSON; secrets included."""
        return asdict(replace(self.for_others(), renewal=None, fault=None))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read `to_json`."""
        pairs = {name: tuple(tuple(pair) for pair in fields[name]) for name in ("client", "origins")}
        nested = {"s3": S3Options(**fields["s3"]), "proxies": Proxies(**fields["proxies"])}
        return cls(**{**fields, **pairs, **nested})
