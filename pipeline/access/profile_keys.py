"""Keys of a profile of this machine: those in its files, or those that botocore makes from SSO, a role or a process."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from botocore import exceptions as boto

from pipeline.access.aws_session import configured_session, without_empty

_NOT_OF_A_PROFILE = ("env", "ec2-credentials-file", "boto-config", "container-role", "iam-role")


class ProfileKeysError(boto.CredentialRetrievalError):  # type: ignore[misc]
    """A profile for which botocore got no keys; names profile and file, and says what to do."""

    def __init__(self, profile: ProfileKeys, error: BaseException) -> None:
        super().__init__(provider=profile.text, error_msg=f"{type(error).__name__}: {error}")
        self.remedy = (
            f"log in again (`aws sso login --profile {profile.name}`), correct the profile, or set AWS_PROFILE"
        )


@dataclass(frozen=True)
class Keys:
    """An access key, and what belongs to it."""

    key: str = field(repr=False)
    secret: str = field(repr=False)
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ProfileKeys:
    """A profile that has keys, or makes them; means nothing on another machine."""

    name: str
    config_file: str
    credentials_file: str

    @property
    def text(self) -> str:
        """The profile and its file, for people."""
        has_config = os.path.exists(self.config_file)  # noqa: PTH110
        file = self.config_file if has_config else self.credentials_file
        return f"profile {self.name} of {file}"

    def now(self) -> Keys:
        """Keys that are valid now; asks services, processes and files where the last ones are about to expire.

        Raises:
            ProfileKeysError: None can be obtained.
        """
        try:
            found = _made.get(self) or _made.setdefault(self, self._credentials())
            if found is None:
                raise boto.NoCredentialsError
            frozen = found.get_frozen_credentials()
        except Exception as error:  # of whatever the profile asks: files, processes, web services
            _made.pop(self, None)
            raise ProfileKeysError(self, error) from error
        return Keys(frozen.access_key, frozen.secret_key, frozen.token)

    def forget(self) -> None:
        """Have the next `now` look again: what it had was refused."""
        _made.pop(self, None)

    def _credentials(self) -> Any:
        session = configured_session(
            without_empty(os.environ)
            | {
                "AWS_DEFAULT_PROFILE": self.name,
                "AWS_CONFIG_FILE": self.config_file,
                "AWS_SHARED_CREDENTIALS_FILE": self.credentials_file,
            }
        )
        chain = session.get_component("credential_provider")
        for method in _NOT_OF_A_PROFILE:
            chain.remove(method)
        return session.get_credentials()


# botocore's own objects, which renew themselves; they cannot be pickled, and a fork may use its parent's.
_made: dict[ProfileKeys, Any] = {}
