"""Bodies of S3 objects by obstore in place of s3fs, for less CPU time; all other requests stay with s3fs.

botocore's client says where each bucket is, and with which keys it is asked, so that every setting is looked up and
understood in one place; obstore signs, sends and receives. What it cannot do as s3fs does is refused when a file system
is opened (a setting) or left to s3fs (a bucket, a key, a fault that is not understood: pipeline.store.obstore_faults).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from botocore import exceptions as boto
from botocore.httpsession import get_cert_path
from fsspec.asyn import sync

from pipeline.access.s3_options import OBSTORE, READER
from pipeline.access.store_access import StoreAccess
from pipeline.errors import StorageError
from pipeline.store import obstore_faults

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, S3Credential

KEYS_SECONDS = 1.0
"""For which keys that expire are used before they are asked for again; botocore renews them minutes before they do."""
EVERY_HOST = "*,0.0.0.0/0,::/0"
"""That need no proxy: a star alone means names, not addresses."""
_NO_LIMIT = "365days"
_NOT_IN_KEYS = ("", ".", "..")


@dataclass(frozen=True)
class _Way:
    """How a bucket is reached."""

    address: str
    """To which a slash and the key are added."""
    region: str
    """Which requests are signed for."""
    key: str
    secret: str
    token: str | None


@dataclass(frozen=True)
class _Opened:
    way: _Way | None
    """None: by s3fs alone."""
    store: Any
    at_seconds: float


class ObstoreBodies:
    """Bodies from the buckets of one s3fs file system.

    Owns: a client with its connections for each bucket.
    Concurrency: safe to call from several threads.
    Failure: none of its own; a child of a fork, in which the threads of obstore are gone, leaves all to s3fs.
    """

    def __init__(
        self, *, proxy: str | None, connect_timeout_seconds: float, read_timeout_seconds: float, requester_pays: bool
    ) -> None:
        self._requester_pays = requester_pays
        self._client: ClientConfig = {
            "allow_http": True,
            "allow_invalid_certificates": False,
            "connect_timeout": f"{connect_timeout_seconds:.3f}s",
            "read_timeout": f"{read_timeout_seconds:.3f}s",
            "timeout": _NO_LIMIT,  # of a whole body, however long
            "proxy_url": proxy or "http://127.0.0.1:9",  # any: without one it would look for the machine's
            "proxy_excludes": "none.invalid" if proxy else EVERY_HOST,
        }
        self._opened: dict[str, _Opened] = {}

    def fetch(
        self,
        filesystem: Any,
        path: str,
        place: tuple[int, int | None],
        *,
        etag: str | None,
        begin: Callable[[str | None], None],
        take: Callable[[bytes], None],
    ) -> bool:
        """Fetch a range; whether it came whole. If not, s3fs is to be asked for what is still missing.

        Args:
            filesystem: The `s3fs.S3FileSystem` to which this belongs.
            path: Bucket and key.
            place: First byte, and the one behind the last; None: the object's end.
            etag: The version that is meant; None: whichever lies there.
            begin: Told the version of what comes.
            take: Given each piece as it comes.

        Raises:
            Exception: What s3fs would raise.
        """
        bucket, key, _ = filesystem.split_path(path)
        if not _is_here() or any(part in _NOT_IN_KEYS for part in key.split("/")):
            return False
        opened = self._of(filesystem, bucket)
        if opened.way is None:
            return False
        from obstore import get
        from obstore.exceptions import BaseError

        first, end = place
        options: GetOptions = {"range": {"offset": first} if end is None else (first, end)}
        if etag:
            options["if_match"] = etag
        try:
            answer = get(opened.store, key, options=options)
            begin(answer.meta["e_tag"])
            for piece in answer.stream(min_chunk_size=1):  # a larger one is lost where the body breaks off
                take(piece)
        except (BaseError, FileNotFoundError, ValueError) as error:
            fault = obstore_faults.of_s3fs(error, key)
        else:
            return True
        if fault is None:
            self._opened[bucket] = replace(opened, at_seconds=-math.inf)  # s3fs may find another way
            return False
        raise fault  # outside of the handler: its cause is an answer, by which it is sorted

    def _of(self, filesystem: Any, bucket: str) -> _Opened:
        found = self._opened.get(bucket)
        lasts_seconds = math.inf if filesystem.key else KEYS_SECONDS  # such as were given stay what they are
        if found and time.monotonic() - found.at_seconds < lasts_seconds:
            return found
        way = sync(filesystem.loop, _way, filesystem, bucket)
        store = found.store if found and found.way == way else way and self._made(way)
        self._opened[bucket] = _Opened(way, store, time.monotonic())
        return self._opened[bucket]

    def _made(self, way: _Way) -> Any:
        """A client; names each setting for which it would else take a variable of this process."""
        from obstore.store import S3Store

        keys: S3Credential = {
            "access_key_id": way.key,
            "secret_access_key": way.secret,
            "token": way.token,
            "expires_at": None,  # another one is made for newer keys
        }
        client = self._client.copy()
        if way.address.startswith("https"):
            client["root_certificate"] = Path(
                get_cert_path(True)
            ).read_bytes()  # botocore's; the machine's come besides
        return S3Store(
            "-",  # the address has it
            endpoint=way.address,
            aws_endpoint_url_s3=way.address,
            virtual_hosted_style_request=True,
            region=way.region,
            request_payer=self._requester_pays,
            skip_signature=False,
            s3_express=False,
            unsigned_payload=False,
            server_side_encryption="AES256",  # of writes, which there are none; a customer's key would go with reads
            client_options=client,
            retry_config={"max_retries": 0},  # our deadline rules
            credential_provider=lambda: keys,
        )


def open_bodies(storage: StoreAccess, **settings: Any) -> ObstoreBodies | None:
    """What fetches bodies in place of s3fs; None where it is s3fs.

    Args:
        storage: Whose setting it is.
        settings: Those of an `ObstoreBodies`.

    Raises:
        StorageError: obstore is not installed, or a setting is one that it does not know.
    """
    if storage.s3.reader != OBSTORE:
        return None
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        remedy = "`pip install 'convmae-pretrain[obstore]'` on every node, or unset it"
        raise StorageError(READER, "needs a package that is not installed", OBSTORE, remedy) from error
    origins = dict(storage.origins)
    by_s3fs = f"unset {READER}: s3fs can do that"
    if version := dict(storage.client).get("signature_version"):
        where = origins.get("signature_version", "signature_version")
        raise StorageError(where, f"must be unset with {READER}={OBSTORE}, which signs by s3v4", version, by_s3fs)
    if (storage.endpoint_url or "https").startswith("https"):
        bundle = storage.ca_bundle or os.environ.get("AWS_CA_BUNDLE")
        if bundle:
            where = origins.get("ca_bundle", "AWS_CA_BUNDLE") if storage.ca_bundle else "AWS_CA_BUNDLE"
            rule = f"must be unset with {READER}={OBSTORE}, which trusts the machine's authorities besides"
            raise StorageError(where, rule, bundle, by_s3fs)
    return ObstoreBodies(requester_pays=storage.s3.requester_pays, **settings)


async def _way(filesystem: Any, bucket: str) -> _Way | None:
    """How botocore's client would reach a bucket; None where obstore could not."""
    await filesystem.set_session()
    client = await filesystem.get_s3(bucket)
    operation = client.meta.service_model.operation_model("GetObject")
    context = {"client_region": client.meta.region_name, "client_config": client.meta.config, "auth_type": None}
    try:
        address, headers, _ = await client._resolve_endpoint_ruleset(
            operation, {"Bucket": bucket, "Key": "key"}, context
        )
    except boto.BotoCoreError:  # a name that is none: s3fs says so in its own words
        return None
    signing = context.get("signing", {})
    credentials = client._request_signer._credentials
    is_known = context["auth_type"] == "v4" and signing.get("signing_name") == "s3" and not headers
    if not is_known or credentials is None:
        return None
    keys = await credentials.get_frozen_credentials()
    return _Way(address, signing["region"], keys.access_key, keys.secret_key, keys.token)


_users: set[int] = set()


def _is_here() -> bool:
    """Whether this process may use obstore: a child of one that has would wait for threads that it does not have."""
    if not _users:
        _users.add(os.getpid())
    return os.getpid() in _users
