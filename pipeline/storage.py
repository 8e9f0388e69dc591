"""Files and objects by URL: one picklable value that reads, writes and lists, and outlives a storage restart.

Everything goes through fsspec, so ``s3://``, ``gs://``, ``memory://``, ``file://`` and plain paths behave alike. Local
files are written here, because only a temporary file and a rename make that atomic.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from pipeline import faults
from pipeline.errors import StorageError, clipped
from pipeline.local_files import local_files, read_part
from pipeline.ranged_read import HttpRangedRead, RangedRead
from pipeline.throttle import Throttle

T = TypeVar("T")

CHECK_SECONDS = 3.0
CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 30.0
MAX_CONNECTIONS = 64
DELETES_AT_ONCE = 32
PROBE_BYTES = 65536
STORES = {
    **dict.fromkeys(("file", "local", "memory"), "fsspec"),
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "ftp": "fsspec",
    "hdfs": "pyarrow",
    "webhdfs": "requests",
    "hf": "huggingface_hub",
    "oss": "ossfs",
    "oci": "ocifs",
}
"""Protocols that are taken, with the package that each needs. fsspec has more: views of other file systems, archives,
and services that hold no data sets, which a list or manifest of a stranger must not make this process open."""
_S3 = ("s3", "s3a")
_HTTP = ("http", "https")
_RANGED = dict.fromkeys(_S3, RangedRead) | dict.fromkeys(_HTTP, HttpRangedRead)
_THERE_ALREADY = ("PreconditionFailed", "ConditionalRequestConflict")


@dataclass(frozen=True)
class Storage:
    """How to reach URLs. Travels as an argument, so that secrets stay out of logs and of Ray's runtime environment.

    Every method raises FileNotFoundError where nothing lies at the URL, StorageError for what the user can mend
    (unreachable, credentials, missing bucket, full disk) and OSError naming the URL for the rest. Transient faults are
    retried with backoff until `retry_seconds` have passed. Methods block and are safe to call from several threads.
    """

    endpoint_url: str | None = None
    """S3 endpoint; None leaves it to botocore."""
    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    region: str | None = None
    retry_seconds: float = 120.0
    """Long enough for a storage server to be restarted."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Storage:
        """Read AWS_* variables; absent ones fall through to botocore's own chain (profile files, instance roles)."""
        return cls(
            endpoint_url=environ.get("AWS_ENDPOINT_URL") or None,
            key=environ.get("AWS_ACCESS_KEY_ID") or None,
            secret=environ.get("AWS_SECRET_ACCESS_KEY") or None,
            token=environ.get("AWS_SESSION_TOKEN") or None,
            region=environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or None,
        )

    @staticmethod
    def join(url: str, *parts: str) -> str:
        """``join("s3://bucket/data/", "a", "b")`` is ``s3://bucket/data/a/b``."""
        return "/".join([url.rstrip("/"), *parts])

    @staticmethod
    def absolute(url: str) -> str:
        """The same place named so that a process with another working directory finds it."""
        return str(LocalFileSystem._strip_protocol(url)) if is_local(url) else url

    @staticmethod
    def local_path(url: str) -> str:
        """The path of a URL for which `is_local` holds."""
        return _path(url)

    def read(self, url: str) -> bytes:
        """All bytes of a file or object."""
        if is_local(url):
            return self._call(url, lambda _, path: read_part(path, 0, None))
        # A start spares s3fs the HEAD that it sends before every whole read.
        return self._call(url, lambda fs, path: _ranged(fs, path, 0, None))

    def read_range(self, url: str, offset: int, length: int, etag: str | None = None) -> bytes:
        """`length` bytes from `offset`; fewer where the object ends before that.

        Args:
            url: What to read.
            offset: First byte.
            length: Bytes.
            etag: The version that is meant, as etag() gave it; None: whatever lies there. S3 and web servers alone look
                at it.

        Raises:
            ReplacedError: The object has another ETag by now.
        """
        if is_local(url):
            return self._call(url, lambda _, path: read_part(path, offset, length))
        if length > 0 and (kind := _RANGED.get(_protocol(url))):
            return self._call(url, kind(offset, length, etag).attempt)
        return self._call(url, lambda fs, path: _ranged(fs, path, offset, offset + length))

    def read_start(self, url: str, length: int) -> bytes:
        """The first `length` bytes; fewer where there are no more. Also of web servers that know no ranges."""
        if is_web(url):  # each attempt begins anew
            return self._call(url, lambda fs, path: HttpRangedRead(0, length, None).attempt(fs, path))
        return self.read_range(url, 0, length)

    def write(self, url: str, data: bytes) -> None:
        """Put `data` there whole or not at all, replacing what was there."""
        if is_local(url):
            self._put_local(url, lambda temporary: temporary.write_bytes(data))
        else:
            self._call(url, lambda fs, path: fs.pipe_file(path, data))

    def create(self, url: str, data: bytes) -> bool:
        """Put `data` there if nothing is there yet; of several at once only one gets True.

        A conditional write (S3's If-None-Match, exclusive creation of a local file). Other stores check and then write.
        """

        def put(filesystem: Any, path: str) -> bool:
            try:
                if is_local(url):
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    with Path(path).open("xb") as file:
                        file.write(data)
                else:
                    filesystem.pipe_file(path, data, mode="create")
            except OSError as error:
                if not isinstance(error, FileExistsError) and faults.http_code(error) not in _THERE_ALREADY:
                    raise
                # An attempt whose answer got lost may have been ours.
                return bool(_ranged(filesystem, path, 0, None) == data)
            return True

        return self._call(url, put)

    def replace(self, url: str, data: bytes, expected: bytes) -> bool:
        """Put `data` there if exactly `expected` lies there; of several at once only one gets True.

        A conditional write (S3's If-Match, a lock on the folder of a local file). Other stores check and then write.
        """
        if is_local(url):
            with _locked(Path(_path(url)).parent):
                found = self.read(url)
                if found == expected:
                    self.write(url, data)
            return found in (expected, data)

        def put(filesystem: Any, path: str) -> bool:
            info = filesystem.info(path)
            found = _ranged(filesystem, path, 0, None)
            if found != expected:
                return bool(found == data)  # an attempt whose answer got lost may have been ours
            condition = {"IfMatch": info["ETag"]} if _protocol(url) in _S3 else {}
            try:
                filesystem.pipe_file(path, data, **condition)
            except OSError as error:
                if faults.http_code(error) not in _THERE_ALREADY:
                    raise
                return bool(_ranged(filesystem, path, 0, None) == data)
            return True

        return self._call(url, put)

    def upload(self, local_path: Path, url: str) -> None:
        """Copy a local file there, whole or not at all."""
        if is_local(url):
            self._put_local(url, lambda temporary: shutil.copyfile(local_path, temporary))
        else:
            self._call(url, lambda fs, path: fs.put_file(str(local_path), path))

    def download(self, url: str, local_path: Path) -> None:
        """Copy a file or object to a local path, whole or not at all."""
        self._put_local(
            str(local_path), lambda temporary: self._call(url, lambda fs, path: fs.get_file(path, str(temporary)))
        )

    def attempt(self, url: str, call: Callable[[Any, str], T]) -> T:
        """Run `call(filesystem, path)` with the retries and errors of every other method; it must be safe to repeat."""
        return self._call(url, call)

    def exists(self, url: str) -> bool:
        """Whether a file or object (not a folder or prefix) lies there."""
        try:
            return bool(self._call(url, _is_file))
        except FileNotFoundError:
            return False

    def size(self, url: str) -> int:
        """Bytes of a file or object."""
        size = self._call(url, lambda fs, path: fs.info(path)["size"])
        return len(self.read(url)) if size is None else int(size)  # some web servers do not say

    def etag(self, url: str) -> str | None:
        """What the store calls this version of an object, quotes and all; None where it has no such name."""
        info = self._call(url, lambda fs, path: fs.info(path))
        return info.get("ETag") or info.get("etag") or None

    def list_names(self, url: str) -> list[str]:
        """Sorted names of the files and folders directly under `url`; empty where there is no such folder."""
        try:
            paths = self._call(url, lambda fs, path: fs.ls(path, detail=False))
        except FileNotFoundError:
            return []
        root = _path(url)
        return sorted({path.rstrip("/").rpartition("/")[2] for path in paths if path.rstrip("/") != root.rstrip("/")})

    def list_files(self, url: str) -> dict[str, int]:
        """Size in bytes of every file under `url` at any depth, by its path relative to `url`, sorted.

        Links to local folders are followed. A link to nowhere counts as a file of no bytes; pipes, sockets and devices
        do not count.
        """
        if is_local(url):
            return self._call(url, lambda _, path: dict(sorted(local_files(path))))
        found = self._call(url, lambda fs, path: fs.find(path, detail=True))
        root = _path(url).rstrip("/") + "/"
        return {path.removeprefix(root): int(info["size"] or 0) for path, info in sorted(found.items())}

    def delete(self, url: str) -> None:
        """Remove a file or object; that it is already gone is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._call(url, lambda fs, path: fs.rm_file(path))

    def delete_all(self, urls: Iterable[str]) -> None:
        """Remove files or objects as `delete`, several at once: a request each, which every store knows.

        Raises what the first raised that failed, when all others are gone.
        """
        with ThreadPoolExecutor(DELETES_AT_ONCE) as threads:
            deletes = [threads.submit(self.delete, url) for url in urls]
        for delete in deletes:
            delete.result()

    def check(self, url: str, *, write: bool, shared: bool = False) -> None:
        """Fail within seconds if work on `url` cannot succeed.

        Args:
            url: A folder or prefix that will be read, and need not exist yet if it will be written.
            write: Also put a small object under `url` and remove it again.
            shared: Other processes will work on it too.

        Raises:
            StorageError: Unknown protocol, missing package, unreachable, refused credentials, missing bucket,
                unwritable folder, full disk.
        """
        if shared and _protocol(url) == "memory":
            raise StorageError("URL", "must be one that every process sees", url, "take s3:// or a folder")
        if write and _protocol(url) in _HTTP:
            raise StorageError("URL", "must be one that can be written", url, "take s3:// or a folder")
        hasty = replace(self, retry_seconds=min(CHECK_SECONDS, self.retry_seconds))
        try:
            hasty._probe(url, write=write)
        except FileNotFoundError as error:
            remedy = "take a folder that can be made" if is_local(url) else "check the bucket and AWS_ENDPOINT_URL"
            raise StorageError("storage", "must accept this URL", url, remedy) from error

    def _probe(self, url: str, *, write: bool) -> None:
        self._filesystem(url)
        if _protocol(url) in _S3:
            # HEAD answers carry no reason; a listing of one says which of key, secret and bucket is wrong.
            self._call(url, _list_one)
        elif not is_local(url):
            self.exists(url)
        if write:
            probe = self.join(url, f".write-check-{os.getpid()}-{os.urandom(4).hex()}")
            self.write(probe, bytes(PROBE_BYTES))
            self.delete(probe)

    def _filesystem(self, url: str) -> Any:
        protocol = _protocol(url)
        return _filesystem(self, protocol, _server(protocol, url), os.getpid())

    def _call(self, url: str, call: Callable[[Any, str], T]) -> T:
        throttle = None if is_local(url) else _throttle(self.endpoint_url, _protocol(url), os.getpid())
        return faults.retry(lambda: call(self._filesystem(url), _path(url)), url, self.retry_seconds, throttle=throttle)

    def _put_local(self, url: str, fill: Callable[[Path], object]) -> None:
        """Fill a temporary file beside the target, then rename it over the target."""

        def put() -> None:
            target = Path(_path(url))
            target.parent.mkdir(parents=True, exist_ok=True)
            with _temporary_beside(target) as temporary:
                fill(temporary)
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                temporary.replace(target)

        faults.retry(put, url, self.retry_seconds)


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine: ``file://`` or no protocol at all."""
    return _protocol(url) in ("file", "local")


def is_s3(url: str) -> bool:
    """Whether `url` is on S3 or a store that speaks its language."""
    return _protocol(url) in _S3


def is_web(url: str) -> bool:
    """Whether `url` is an http address."""
    return _protocol(url) in _HTTP


@functools.lru_cache(maxsize=16)
def _filesystem(
    storage: Storage,
    protocol: str,
    server: tuple[tuple[str, Any], ...],
    process_id: int,  # noqa: ARG001
) -> Any:
    """One connection pool per process and Storage; fsspec's own cache would make one per thread."""
    kind = _kind(protocol)
    if protocol in _HTTP:
        limits = aiohttp.ClientTimeout(None, sock_connect=CONNECT_TIMEOUT_SECONDS, sock_read=READ_TIMEOUT_SECONDS)
        return kind(use_listings_cache=False, client_kwargs={"timeout": limits}, skip_instance_cache=True)
    if protocol not in _S3:
        return kind(use_listings_cache=False, **dict(server)) if protocol != "memory" else kind()
    filesystem = kind(
        endpoint_url=storage.endpoint_url,
        key=storage.key,
        secret=storage.secret,
        token=storage.token,
        client_kwargs={"region_name": storage.region} if storage.region else {},
        config_kwargs={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "read_timeout": min(READ_TIMEOUT_SECONDS, max(CONNECT_TIMEOUT_SECONDS, storage.retry_seconds)),
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": MAX_CONNECTIONS,
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    filesystem.retries = 1  # one attempt inside s3fs too: our deadline rules
    return filesystem


@functools.lru_cache(maxsize=16)
def _throttle(endpoint_url: str | None, protocol: str, process_id: int) -> Throttle:  # noqa: ARG001
    """One for each store and process."""
    return Throttle(MAX_CONNECTIONS)


def _server(protocol: str, url: str) -> tuple[tuple[str, Any], ...]:
    """What the file system must be told of the server that a URL names: host, port, user, account."""
    if protocol in ("file", "local", "memory", *_S3, *_HTTP):
        return ()
    return tuple(sorted(_kind(protocol)._get_kwargs_from_urls(url).items()))


def _kind(protocol: str) -> Any:
    try:
        return fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:  # ValueError: fsspec learns of the protocol from the package
        raise StorageError(
            "URL", "needs a package that is not installed", f"{protocol}://", f"`pip install {STORES[protocol]}`"
        ) from error


def _protocol(url: str) -> str:
    if not url:
        raise StorageError("URL", "must not be empty", url, "write s3://bucket/folder or a path")
    if "\0" in url:
        raise StorageError("URL", "must hold no NUL", clipped(url), "correct what it comes from")
    protocol, separator, _ = url.partition("://")
    if not separator:
        # "s3:/bucket" would otherwise become a folder named "s3:".
        scheme = url.partition(":/")[0]
        if scheme not in STORES or ":/" not in url:
            return "file"
        raise StorageError(
            "URL", "must have two slashes", url, f"write {scheme}://{url.partition(':/')[2].lstrip('/')}"
        )
    if protocol in STORES:
        _refuse_password(protocol, url)
        return protocol
    foreign = protocol in known_implementations or "::" in protocol
    nearest = [] if foreign else difflib.get_close_matches(protocol, STORES, n=1, cutoff=0.4)
    remedy = f"did you mean {nearest[0]}://?" if nearest else "use s3://, gs://, file:// or a path"
    raise StorageError("URL", "must have a known protocol", clipped(url), remedy)


def _refuse_password(protocol: str, url: str) -> None:
    """URLs are written into recipes, reports and logs. Elsewhere than here a bare name before the @ is no secret."""
    host, _, rest = url.partition("://")[2].partition("/")
    known, at, place = host.rpartition("@")
    if at and (":" in known or protocol in (*_S3, *_HTTP)):
        remedy = "give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by the machine's role"
        raise StorageError("URL", "must hold no credentials", f"{protocol}://...@{place}/{rest}", remedy)


def _path(url: str) -> str:
    return str(_kind(_protocol(url))._strip_protocol(url))


def _ranged(filesystem: Any, path: str, start: int, end: int | None) -> bytes:
    try:
        return bytes(filesystem.cat_file(path, start=start, end=end))
    except OSError as error:
        if faults.http_code(error) == "InvalidRange":  # S3's answer for a range behind the end
            return b""
        raise


def _is_file(filesystem: Any, path: str) -> bool:
    try:
        return bool(filesystem.info(path)["type"] == "file")
    except NotADirectoryError:  # nothing can lie below a file
        return False


def _list_one(filesystem: Any, path: str) -> None:
    bucket, key, _ = filesystem.split_path(path)
    if not bucket:
        raise StorageError("URL", "must name a bucket", "s3://", "write s3://bucket/folder")
    filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _temporary_beside(target: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(0o644)  # mkstemp's 0600 would hide shared data from others
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
