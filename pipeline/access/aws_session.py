"""botocore sessions that are configured by a mapping instead of by the process's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiobotocore.session import AioSession
from botocore.configprovider import (
    BOTOCORE_DEFAUT_SESSION_VARIABLES,
    DEFAULT_S3_CONFIG_VARS,
    ConfigChainFactory,
    ConfiguredEndpointProvider,
    ConfigValueStore,
    ConstantProvider,
    SectionConfigProvider,
)
from botocore.session import Session


class _Configured:
    """The part of a session that looks up its configuration; an empty variable is none."""

    environ: Mapping[str, str]

    def _register_config_store(self: Any) -> None:
        chain = ConfigChainFactory(session=self, environ=self.environ)

        def providers(variables: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: chain.create_config_chain(name, found[1], found[0], found[2], found[3])
                for name, found in variables.items()
            }

        mapping = providers(BOTOCORE_DEFAUT_SESSION_VARIABLES)
        mapping["s3"] = SectionConfigProvider("s3", self, providers(DEFAULT_S3_CONFIG_VARS))
        mapping["proxies_config"] = ConstantProvider(None)
        self._components.register_component("config_store", ConfigValueStore(mapping=mapping))


class _ConfiguredSession(_Configured, Session):  # type: ignore[misc]
    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        super().__init__()


class ProcessSession(_Configured, AioSession):  # type: ignore[misc]
    """The chain of this process, with which it finds keys of its own."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = without_empty(environ)
        super().__init__()


class PlainSession(AioSession):  # type: ignore[misc]
    """A session that looks up nothing: its clients have the settings that they are given, else botocore's defaults."""

    def _register_config_store(self) -> None:
        variables = {name: found[2] for name, found in BOTOCORE_DEFAUT_SESSION_VARIABLES.items()}
        nothing = dict.fromkeys(("config_file", "credentials_file", "s3", "proxies_config"))
        mapping = {name: ConstantProvider(value) for name, value in {**variables, **nothing}.items()}
        self._components.register_component("config_store", ConfigValueStore(mapping=mapping))

    def _add_configured_endpoint_provider(self, client_name: str, config_store: Any) -> None:  # noqa: ARG002
        config_store.set_config_provider("endpoint_url", ConstantProvider(None))


def configured_session(environ: Mapping[str, str]) -> Any:
    """A session of botocore whose configuration is that of `environ`.

    Its keys are not: the chain looks for them where this process runs.
    """
    return _ConfiguredSession(without_empty(environ))


def without_empty(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are not empty."""
    return {name: value for name, value in environ.items() if value}


def configured_endpoint(session: Any) -> str | None:
    """The S3 endpoint that a session's configuration names; None where it names none."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return None
    profile = session.get_scoped_config()
    found: str | None = ConfiguredEndpointProvider(session.full_config, profile, "s3", session.environ).provide()
    return found


def absolute(path: str) -> str:
    """A path as botocore understands it, and the same from every working folder."""
    return str(Path(os.path.expandvars(path)).expanduser().absolute())
