"""Faults of talking to a store, sorted: transient, the user's to fix, or neither.

s3fs lets botocore's and aiohttp's exceptions through as they are, some of them no OSErrors. Here every exception is
sorted once, so that the rest of the code sees FileNotFoundError, StorageError, or an OSError that names the URL.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from pipeline.access.profile_keys import ProfileKeysError
from pipeline.errors import CredentialsError, RefusedError, ReplacedError, StorageError, UnreachableError, clipped

_S3 = ("s3://", "s3a://")
_WEB = ("http://", "https://")
_GOOGLE = ("gs://", "gcs://")
_AZURE = ("az://", "abfs")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_A_FOLDER = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_UNREACHABLE = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    ResponseParserError,  # SlowDown answers of some servers are no XML: https://github.com/fsspec/s3fs/issues/484
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    ConnectionError,
    TimeoutError,
)
_NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)
# Of packages that need not be installed.
_UNREACHABLE_NAMES = {
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "google.auth.exceptions.TransportError",
    "requests.exceptions.ConnectionError",
}
_NO_CREDENTIALS_NAMES = {
    "azure.core.exceptions.ClientAuthenticationError",
    "google.auth.exceptions.GoogleAuthError",
}
_AGAIN_CODES = {
    "SlowDown",
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "Throttling",
    "RequestLimitExceeded",
    "ConditionalRequestConflict",  # a conditional write met another one: it says nothing of what lies there
    "OperationAborted",
}
_CREDENTIAL_CODES = {
    "InvalidAccessKeyId": "the access key id is unknown there",
    "SignatureDoesNotMatch": "the secret does not belong to the access key id",
    "ExpiredToken": "the session token has expired",
    "TokenRefreshRequired": "the session token has expired",
    "InvalidToken": "the session token is malformed",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
    "400": "the answer has no reason; mostly the session token has expired",  # a HEAD's
}


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, boto.SSLError | aiohttp.ClientSSLError):
        return False
    code, status = _answer(error)
    if code in _AGAIN_CODES or status == 429 or (status >= 500 and status not in (501, 507)):
        return True
    return not status and _is_unreachable(error)


def is_refused(error: BaseException, url: str) -> bool:
    """Whether credentials are missing or were refused, so that others may help; a web server asks for none of ours."""
    code, status = _answer(error)
    if url.startswith(_WEB):
        return False
    named = isinstance(error, _NO_CREDENTIALS) or _is_named(error, _NO_CREDENTIALS_NAMES)
    return named or code in _CREDENTIAL_CODES or status in (401, 403)


def is_precondition(error: BaseException) -> bool:
    """Whether the store answered that the condition of a write does not hold."""
    code, status = _answer(error)
    return code == "PreconditionFailed" or status == 412


def is_busy(error: BaseException) -> bool:
    """Whether the store answered that it gets too many requests."""
    code, status = _answer(error)
    return code in ("SlowDown", "Throttling", "RequestLimitExceeded", "ServiceUnavailable") or status in (429, 503)


def translated(  # noqa: PLR0911, PLR0912
    error: Exception, url: str, origins: Mapping[str, str] = MappingProxyType({})
) -> Exception:
    """The exception that callers see in place of `error`.

    Long, since it is a table in the form of code: a line or two for each kind of fault, the first that fits.
    """
    code, status = _answer(error)
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, StorageError):
        return error
    if is_precondition(error):
        return ReplacedError("object", "must be the one that was meant (ETag)", url, "restore the object")
    if code == "NoSuchBucket":
        return StorageError("bucket", "must exist", url, "create it, or correct its name in the URL")
    if isinstance(error, FileNotFoundError) or status in (404, 410) or number == errno.ELOOP:  # links to each other
        return FileNotFoundError(errno.ENOENT, "nothing lies here", url)
    if status in (401, 403, 451) and url.startswith(_WEB):
        return RefusedError("address", "must be open to everybody", url, f"the server answered {status}")
    if is_refused(error, url):
        why = _CREDENTIAL_CODES.get(code, described(_clients(error) or error))
        advice = error.remedy if isinstance(error, ProfileKeysError) else _credentials_remedy(url, origins)
        remedy = f"{why}: {advice}, or ask for the permission"
        return CredentialsError("credentials", "must be accepted by the storage", url, remedy)
    if number in _FULL or status == 507:
        return StorageError("disk", "must have space left (ENOSPC)", url, "free some, then run the same command again")
    if number in _REFUSED and not status:
        return StorageError(
            "folder", "must be accessible", url, f"change its permissions or take another ({described(error)})"
        )
    if number == errno.ENAMETOOLONG and not status:
        return StorageError("path", "must be short enough for its file system", clipped(url), "shorten it")
    if number in _NOT_A_FOLDER and not status:
        return StorageError("path", "must fit what lies there", url, f"take another ({described(error)})")
    if isinstance(error, UnicodeEncodeError):  # a surrogate, as JSON can spell it, that stands for no byte
        return StorageError("URL", "must be made of characters", clipped(url), "correct what it comes from")
    if isinstance(error, boto.ParamValidationError):
        return StorageError("URL", "must name a valid bucket and key", url, "correct the URL")
    if status == 407:
        remedy = "write http://USER:PASSWORD@HOST:PORT, or list the host in NO_PROXY"
        return StorageError("HTTP_PROXY", "must let this request pass", url, f"the proxy asks for a password: {remedy}")
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        where = origins.get("endpoint", "AWS_ENDPOINT_URL")
        return StorageError(where, "must be like http://host:port", str(error), "correct it or unset it")
    if not status and _is_unreachable(error):
        where = _address_setting(url, origins)
        remedy = f"check that the server runs{where and f' and that {where} is right'} ({described(error)})"
        return UnreachableError("storage", "must be reachable", url, remedy)
    return OSError(number or errno.EIO, described(error), url)


def is_behind_the_end(error: BaseException) -> bool:
    """Whether the store answered that an object ends before the range that was asked for."""
    code, status = _answer(error)
    return code == "InvalidRange" or status == 416


def http_code(error: BaseException) -> str:
    """S3's error code, for example ``NoSuchUpload``; empty for what is no answer of a server."""
    return _answer(error)[0]


def underlying(error: Exception) -> Exception:
    """The fault behind a FileNotFoundError of fsspec's http, which raises it also for a server that is down."""
    known = aiohttp.ClientError | TimeoutError | StorageError
    hidden = isinstance(error, FileNotFoundError) and isinstance(error.__cause__, known)
    return error.__cause__ if hidden and isinstance(error.__cause__, Exception) else error


def _answer(error: BaseException) -> tuple[str, int]:
    """Error code and HTTP status of a server's answer; ("", 0) where there was none."""
    if answer := _clients(error):
        status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return answer.response.get("Error", {}).get("Code", ""), int(status)
    if isinstance(error, OSError) and str(error).startswith("Forbidden: "):  # gcsfs's
        return "", 403
    names = ("status", "code", "status_code")  # aiohttp's, gcsfs's and adlfs's
    status = next((getattr(error, name) for name in names if hasattr(error, name)), 0)
    return "", int(status) if isinstance(status, int | str) and str(status).isdigit() else 0


def _clients(error: BaseException) -> boto.ClientError | None:
    """botocore's error: s3fs turns it into an OSError and keeps the original as its cause."""
    return next((found for found in (error, error.__cause__) if isinstance(found, boto.ClientError)), None)


def _is_unreachable(error: BaseException) -> bool:
    return isinstance(error, _UNREACHABLE) or _is_named(error, _UNREACHABLE_NAMES)


def _is_named(error: BaseException, names: set[str]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(error).__mro__)


def _address_setting(url: str, origins: Mapping[str, str]) -> str:
    """What says where a store is, for people; empty where the URL alone does."""
    if url.startswith(_GOOGLE):
        return "STORAGE_EMULATOR_HOST"
    if url.startswith(_AZURE):
        return "AZURE_STORAGE_CONNECTION_STRING"
    return origins.get("endpoint", "AWS_ENDPOINT_URL") if url.startswith(_S3) else ""


def _credentials_remedy(url: str, origins: Mapping[str, str]) -> str:
    if url.startswith(_GOOGLE):
        return "log in with gcloud, or set GOOGLE_APPLICATION_CREDENTIALS"
    if url.startswith(_AZURE):
        return "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and what goes with it"
    origin = origins.get("credentials", "")
    if origin.startswith(("profile", "the local stack")):
        return f"correct those of {origin}, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"


def described(error: BaseException) -> str:
    """An exception in a line: its type, and what it says."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
