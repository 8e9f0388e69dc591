"""URLs of files and objects: which protocols are taken, what they need installed, and what each of them means."""

from __future__ import annotations

import difflib
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.registry import known_implementations

from pipeline.errors import StorageError, clipped

STORES = {
    **dict.fromkeys(("file", "local", "memory"), "fsspec"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "ftp": "fsspec",
    "hdfs": "pyarrow",
    "webhdfs": "requests",
    "hf": "huggingface_hub",
    "oss": "ossfs",
    "oci": "ocifs",
}
"""Protocols that are taken, with the package that each needs. fsspec has more: views of other file systems, archives,
and services that hold no datasets, which a list or manifest of a stranger must not make this process open."""
LOCAL = ("file", "local")
S3 = ("s3", "s3a")
HTTP = ("http", "https")
GOOGLE = ("gs", "gcs")
AZURE = ("az", "abfs", "abfss")
BUCKETS = (*S3, *GOOGLE, "az", "oss")
"""Whose URLs begin with the name of a bucket."""
_SPELLINGS = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "local": "file"}
"""Of one protocol, by others than its own name."""


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine: ``file://`` or no protocol at all."""
    return protocol_of(url) in LOCAL


def is_s3(url: str) -> bool:
    """Whether `url` is on S3 or a store that speaks its language."""
    return protocol_of(url) in S3


def is_web(url: str) -> bool:
    """Whether `url` is an http address."""
    return protocol_of(url) in HTTP


def protocol_of(url: str) -> str:
    """A key of STORES.

    Raises:
        StorageError: The URL is empty, malformed, of an unknown protocol, or holds a password.
    """
    if not url:
        raise StorageError("URL", "must not be empty", url, "write s3://bucket/folder or a path")
    if "\0" in url:
        raise StorageError("URL", "must hold no NUL", clipped(url), "correct what it comes from")
    try:
        url.encode("utf-8", "surrogateescape")  # names of local files may be any bytes
    except UnicodeEncodeError:
        remedy = "correct what it comes from"
        raise StorageError("URL", "must be made of characters, or of a file's bytes", clipped(url), remedy) from None
    protocol, separator, _ = url.partition("://")
    if not separator:
        # "s3:/bucket" would otherwise become a folder named "s3:".
        scheme = url.partition(":/")[0].lower()
        if scheme not in STORES or ":/" not in url:
            return "file"
        raise StorageError(
            "URL", "must have two slashes", url, f"write {scheme}://{url.partition(':/')[2].lstrip('/')}"
        )
    if protocol in STORES:
        _refuse_password(protocol, url)
        if protocol in HTTP:
            _refuse_odd_host(url)
        return protocol
    foreign = protocol in known_implementations or "::" in protocol
    nearest = [] if foreign else difflib.get_close_matches(protocol, STORES, n=1, cutoff=0.4)
    remedy = f"did you mean {nearest[0]}://?" if nearest else "use s3://, gs://, file:// or a path"
    raise StorageError("URL", "must have a known protocol", clipped(url), remedy)


def is_folder_mark(path: str) -> bool:
    """Whether an object without bytes stands for a folder: consoles write `photos/`, and Hadoop `photos_$folder$`."""
    return path.endswith(("/", "_$folder$"))


def with_known_scheme(url: str) -> str:
    """The URL with the scheme as it is written here: in lower case, and one for each protocol."""
    scheme, separator, rest = url.partition("://")
    known = _SPELLINGS.get(scheme.lower(), scheme.lower())
    return f"{known}://{rest}" if separator and known in STORES else url


def path_of(url: str) -> str:
    """Its path in fsspec's file system of the protocol: a local path, or bucket and key."""
    return str(kind_of(protocol_of(url))._strip_protocol(url))


def kind_of(protocol: str) -> Any:
    """fsspec's class for a protocol.

    Raises:
        StorageError: The package that it needs is not installed.
    """
    try:
        return fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:  # ValueError: fsspec learns of the protocol from the package
        raise StorageError(
            "URL", "needs a package that is not installed", f"{protocol}://", f"`pip install {STORES[protocol]}`"
        ) from error


def server_of(url: str) -> tuple[tuple[str, Any], ...]:
    """The server that a URL names, as arguments of the file system: host, port, user, account."""
    protocol = protocol_of(url)
    if protocol in (*LOCAL, "memory", *S3, *HTTP):
        return ()
    return tuple(sorted(kind_of(protocol)._get_kwargs_from_urls(url).items()))


def _refuse_odd_host(url: str) -> None:
    """Refuse an http address without a host: libraries raise various errors for these, some of them late."""
    try:
        parts = urlsplit(url)
        sound = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or too large, a bracket that is not closed
        sound = False
    if not sound:
        raise StorageError("URL", "must name a host, and a port if it has one", clipped(url), "write http://HOST/PATH")


def _refuse_password(protocol: str, url: str) -> None:
    """Refuse a password: URLs are written into recipes, reports and logs.

    On other stores than S3 and the web a bare name before the @ is no secret.
    """
    host, _, rest = url.partition("://")[2].partition("/")
    known, at, place = host.rpartition("@")
    if at and (":" in known or protocol in (*S3, *HTTP)):
        remedy = "give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by the machine's role"
        raise StorageError("URL", "must hold no credentials", f"{protocol}://...@{place}/{rest}", remedy)
