"""Settings of S3 from botocore's configuration of one environment: looked up once, where a command is typed.

Variables, AWS_PROFILE, config and credentials files, services sections. The result is plain values, each with
where it comes from, and no process looks again. Keys that are made (SSO, an assumed role, a credential process) stay
with whoever can make them: a profile of this machine is a `ProfileKeys`, which does.
"""

from __future__ import annotations

import configparser
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from botocore import exceptions as boto
from botocore.config import Config
from botocore.configloader import raw_config_parse
from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES, DEFAULT_S3_CONFIG_VARS
from botocore.utils import validate_region_name

from pipeline.access.aws_session import absolute, configured_endpoint, configured_session, without_empty
from pipeline.access.profile_keys import ProfileKeys
from pipeline.errors import StorageError, clipped

DEFAULT_REGION = "us-east-1"
"""The region that requests are signed for where none is set, as botocore does."""
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
PROFILE_VARIABLES = ("AWS_DEFAULT_PROFILE", "AWS_PROFILE")
FILE_VARIABLES = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")
REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
RETRY_VARIABLES = ("AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS")
ROLE_VARIABLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)
CHOOSING_VARIABLES = (*ENDPOINT_VARIABLES, *PROFILE_VARIABLES, "AWS_ACCESS_KEY_ID")
"""A person sets one of these to choose a store, or its owner; a role's are set by where a shell runs."""

_CLIENT_SETTINGS = {
    "use_dualstack_endpoint": None,
    "use_fips_endpoint": None,
    "request_checksum_calculation": ("when_supported", "when_required"),
    "response_checksum_validation": ("when_supported", "when_required"),
}
"""botocore's names of what else decides how a client asks, with the values that it knows."""
_AWS_ALONE = ("s3.use_accelerate_endpoint", "s3.use_dualstack_endpoint", "use_dualstack_endpoint", "use_fips_endpoint")
"""Switches that choose among the endpoints of AWS."""
_MADE_BY_FILES = ("role_arn", "sso_role_name", "sso_account_id")
_MADE_AFTER_FILES = ("login_session", "credential_process")


@dataclass(frozen=True)
class S3Settings:
    """All settings of one environment; nothing is left to whoever uses them."""

    endpoint_url: str | None = None
    """None: AWS's own endpoint of the region."""
    region: str = DEFAULT_REGION
    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    profile: ProfileKeys | None = None
    """Makes keys, or has those above; None where they are of variables, or each machine has its own."""
    client: tuple[tuple[str, Any], ...] = ()
    """Further settings of botocore's client, by name."""
    ca_bundle: str | None = None
    origins: tuple[tuple[str, str], ...] = ()
    """Pairs of a setting and the variable, profile or file that it comes from."""


def resolve(environ: Mapping[str, str]) -> S3Settings:
    """Look up the settings of an environment.

    Raises:
        StorageError: A profile that does not exist, a file that is damaged, a value that botocore does not know; names
            the variable or the file.
    """
    lookup = _Lookup(without_empty(environ))
    try:
        return lookup.settings()
    except boto.ProfileNotFound as error:
        raise lookup.unknown_profile() from error
    except boto.ConfigParseError as error:
        path = str(error.kwargs["path"])
        rule = f"must be a file that botocore can read ({_without_content(error.kwargs['error'])})"
        raise StorageError(lookup.file_name(path), rule, path, "correct it, or name another file") from error
    except StorageError:
        raise
    except (boto.BotoCoreError, ValueError, AttributeError, TypeError, KeyError) as error:
        rule = f"must be one that botocore understands ({error})"
        raise StorageError("AWS configuration", rule, lookup.profile_text, "correct it, or set AWS_PROFILE") from error


def refuse_aws_alone(client: Iterable[tuple[str, Any]], endpoint: str, origins: Mapping[str, str]) -> None:
    """Refuse what chooses among the endpoints of AWS beside another endpoint.

    Raises:
        StorageError: Names where it is set.
    """
    for name, value in client:
        if value is True and name in _AWS_ALONE:
            rule = f"must be off with the endpoint {_public(endpoint)}, since it chooses one of AWS"
            raise StorageError(origins[name], rule, value, "remove it, or set AWS_PROFILE to a profile without it")


class _Lookup:
    """botocore's chain for one environment, and where it found what."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.session = configured_session(environ)
        self.profile = next((environ[name] for name in PROFILE_VARIABLES if name in environ), "default")
        self.config_file = absolute(environ.get("AWS_CONFIG_FILE", "~/.aws/config"))
        self.credentials_file = absolute(environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))

    @property
    def profile_text(self) -> str:
        """The profile, for people."""
        return ProfileKeys(self.profile, self.config_file, self.credentials_file).text

    def settings(self) -> S3Settings:
        self.scoped = self.session.get_scoped_config()  # the first error that there can be: no such profile
        endpoint, endpoint_from = self._endpoint()
        region, region_from = self._region()
        self._check_retries()
        client = tuple(self._client(endpoint))
        key, secret, token, profile, keys_from = self._keys()
        origins = [("endpoint", endpoint_from), ("region", region_from), ("credentials", keys_from)]
        origins += [(name, self._where(name)) for name, _ in client]
        bundle, bundle_from = self._ca_bundle()
        if bundle:
            origins.append(("ca_bundle", bundle_from))
        return S3Settings(endpoint, region, key, secret, token, profile, client, bundle, tuple(origins))

    def _endpoint(self) -> tuple[str | None, str]:
        found = configured_endpoint(self.session)
        if found is None:
            return None, "AWS_ENDPOINT_URL (unset: AWS)"
        where = next((name for name in ENDPOINT_VARIABLES if name in self.environ), self._where("endpoint_url"))
        scheme, _, place = found.partition("://")
        if scheme not in ("http", "https") or not place.strip("/") or any(sign in found for sign in " @?#"):
            remedy = "write http://HOST:PORT, or unset it"
            raise StorageError(where, "must be an S3 endpoint like http://host:port", _public(found), remedy)
        return found, where

    def _region(self) -> tuple[str, str]:
        named = next((name for name in REGION_VARIABLES if name in self.environ), None)
        found = self.environ[named] if named else self.scoped.get("region")
        where = named or self._where("region")
        if not found:
            return DEFAULT_REGION, "the default"
        try:
            validate_region_name(found)
        except boto.BotoCoreError as error:
            raise StorageError(where, "must name a region", clipped(found), "write one like us-east-1") from error
        return found, where

    def _check_retries(self) -> None:
        """Refuse settings of retries that botocore does not know: it uses them to ask for keys; ours are separate."""
        mode = self.session.get_config_variable("retry_mode")
        try:
            Config(retries={"mode": mode})
        except boto.BotoCoreError as error:
            remedy = "write legacy, standard or adaptive, or unset it"
            raise StorageError(self._where("retry_mode"), "must be a retry mode", clipped(str(mode)), remedy) from error
        for name in ("max_attempts", "metadata_service_timeout", "metadata_service_num_attempts"):
            try:
                self.session.get_config_variable(name)
            except ValueError as error:
                remedy = "correct it, or unset it"
                raise StorageError(self._where(name), "must be a whole number", clipped(str(error)), remedy) from error

    def _client(self, endpoint: str | None) -> list[tuple[str, Any]]:
        section = self.session.get_config_variable("s3") or {}
        known = {*DEFAULT_S3_CONFIG_VARS} & {*section}
        found = [(f"s3.{name}", section[name]) for name in sorted(known)]
        if version := section.get("signature_version"):
            found.append(("signature_version", version))
        for name, values in _CLIENT_SETTINGS.items():
            value = self.session.get_config_variable(name)
            if values and str(value).lower() not in values:
                remedy = f"write one of {', '.join(values)}"
                raise StorageError(self._where(name), "must be one that botocore knows", clipped(str(value)), remedy)
            if value is not None and (not values or value != values[0]):
                found.append((name, value))
        style = dict(found).get("s3.addressing_style")
        if style not in (None, "path", "virtual", "auto"):
            remedy = "write path, virtual or auto"
            raise StorageError(self._where("s3.addressing_style"), "must be a way to address buckets", style, remedy)
        if endpoint:
            refuse_aws_alone(found, endpoint, {name: self._where(name) for name, _ in found})
        return found

    def _ca_bundle(self) -> tuple[str | None, str]:
        found, where = self.session.get_config_variable("ca_bundle"), self._where("ca_bundle")
        if found and not Path(absolute(found)).is_file():
            raise StorageError(where, "must be a file with certificates", found, "correct it, or unset it")
        return (absolute(found), where) if found else (None, where)

    def _keys(self) -> tuple[str | None, str | None, str | None, ProfileKeys | None, str]:
        if key := self.environ.get("AWS_ACCESS_KEY_ID"):
            secret = self.environ.get("AWS_SECRET_ACCESS_KEY")
            if not secret:
                remedy = "set both, or neither to use AWS_PROFILE, profile files or a role"
                raise StorageError("AWS_SECRET_ACCESS_KEY", "must come with AWS_ACCESS_KEY_ID", "", remedy)
            token = self.environ.get("AWS_SECURITY_TOKEN") or self.environ.get("AWS_SESSION_TOKEN")
            return key, secret, token, None, "AWS_ACCESS_KEY_ID"
        mine = ProfileKeys(self.profile, self.config_file, self.credentials_file)
        if "role_arn" not in self.scoped and "AWS_WEB_IDENTITY_TOKEN_FILE" in self.environ:
            return None, None, None, None, "AWS_WEB_IDENTITY_TOKEN_FILE"
        if any(name in self.scoped for name in _MADE_BY_FILES):
            return None, None, None, mine, mine.text
        in_file = self._credentials_section()
        if "aws_access_key_id" not in in_file and any(name in self.scoped for name in _MADE_AFTER_FILES):
            return None, None, None, mine, mine.text
        if key := self.scoped.get("aws_access_key_id"):
            secret = self.scoped.get("aws_secret_access_key")
            if not secret:
                remedy = "give it aws_secret_access_key, or set AWS_PROFILE to another"
                raise StorageError("AWS profile", "must have a secret with its key", self.profile_text, remedy)
            token = self.scoped.get("aws_security_token") or self.scoped.get("aws_session_token")
            return key, secret, token, mine, mine.text
        role = next((name for name in ROLE_VARIABLES if name in self.environ), None)
        return None, None, None, None, role or "each machine's own, of its role"

    def _credentials_section(self) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = raw_config_parse(self.credentials_file).get(self.profile, {})
        except boto.ConfigNotFound:
            return {}
        return found

    def _where(self, name: str) -> str:
        """The variable or profile from which botocore has the value of a name."""
        variables = DEFAULT_S3_CONFIG_VARS if name.startswith("s3.") else BOTOCORE_DEFAUT_SESSION_VARIABLES
        known = variables.get(name.removeprefix("s3."), (None, None))[1]
        names = [known] if isinstance(known, str) else known or []
        return next((variable for variable in names if variable in self.environ), f"{name} of {self.profile_text}")

    def file_name(self, path: str) -> str:
        """The name of a file in messages: the variable that names it, if one does."""
        named = (
            name for name in FILE_VARIABLES if name in self.environ and absolute(self.environ[name]) == absolute(path)
        )
        return next(named, "AWS configuration")

    def unknown_profile(self) -> StorageError:
        """The error for a profile that does not exist; lists those that do."""
        name = next(name for name in PROFILE_VARIABLES if name in self.environ)
        there = ", ".join(sorted(self.session.available_profiles)) or "none"
        rule = f"must name a profile of {self.config_file} or {self.credentials_file}"
        remedy = f"correct or unset it; there are: {clipped(there)}"
        return StorageError(name, rule, clipped(self.profile), remedy)


def _without_content(error: BaseException) -> str:
    """The fault of a file, and its line number; never the line itself, which may hold a key."""
    lines = [error.lineno] if isinstance(error, configparser.MissingSectionHeaderError) else []
    if isinstance(error, configparser.ParsingError):
        lines = lines or [number for number, _ in error.errors]
    if isinstance(error, configparser.DuplicateSectionError | configparser.DuplicateOptionError):
        lines = [error.lineno or 0]
    return ", ".join([type(error).__name__, *(f"line {number}" for number in lines[:3])])


def _public(endpoint: str) -> str:
    """An address without the password that it may hold."""
    scheme, separator, rest = endpoint.partition("://")
    return clipped(f"{scheme}{separator}{rest.rpartition('@')[2]}")
