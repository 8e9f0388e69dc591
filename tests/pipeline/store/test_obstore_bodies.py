"""Bodies by obstore beside those by s3fs: the same bytes, the same faults, the same settings, in forks and threads."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from loopback_server import LoopbackServer

from pipeline.access.s3_options import OBSTORE, READER, S3FS, S3Options
from pipeline.errors import StorageError, UnreachableError
from pipeline.store import obstore_bodies, obstore_faults
from pipeline.store.storage import Storage

pytest.importorskip("obstore")

OBJECT = os.urandom(300_000)
ETAG = '"of-this-version"'
TOLD = "<?xml version='1.0'?><Error><Code>{}</Code><Message>Told so.</Message></Error>"
ANSWERS: dict[str, tuple[int, str]] = {
    **{f"{status}-{code}": (status, TOLD.format(code)) for status, code in (
        (301, "PermanentRedirect"), (400, "ExpiredToken"), (400, "InvalidToken"), (400, "AuthorizationHeaderMalformed"),
        (400, "InvalidRequest"), (401, "Unauthorized"), (403, "AccessDenied"), (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"), (403, "RequestTimeTooSkewed"), (403, "InvalidObjectState"), (404, "NoSuchKey"),
        (404, "NoSuchBucket"), (405, "MethodNotAllowed"), (409, "OperationAborted"), (412, "PreconditionFailed"),
        (416, "InvalidRange"), (429, "Throttling"), (500, "InternalError"), (501, "NotImplemented"),
        (503, "SlowDown"), (503, "ServiceUnavailable"), (507, "InsufficientStorage"),
    )},
    **{f"{status}-empty": (status, "") for status in (400, 403, 404, 410, 412, 416, 500, 503)},
    **{f"{status}-page": (status, "<html>Busy: try later</html>") for status in (404, 502, 503)},
    **{f"{status}-text": (status, "try\n\nDebug source: later") for status in (404, 500, 503)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)


class FaultyS3(LoopbackServer):
    """Answers GETs as the key says, and notes their headers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, str]] = []
        self.cuts: list[int] = []
        """Bytes after which the next bodies break off."""

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        self.seen.append({**headers, ":path": handler.path})
        name = handler.path.rpartition("/")[2]
        first = int(headers["range"].removeprefix("bytes=").partition("-")[0])
        last = min(int(headers["range"].rpartition("-")[2] or len(OBJECT)), len(OBJECT) - 1)
        if name in ANSWERS:
            status, body = ANSWERS[name]
            self._send(handler, status, {"Content-Type": "application/xml"}, body.encode())
        elif name == "whole":
            self._send(handler, 200, {"ETag": ETAG}, OBJECT)
        elif name == "silent":
            handler.close_connection = True
        elif name == "hanging":
            self.closed.wait()
        elif headers.get("if-match", ETAG) != ETAG:
            self._send(handler, 412, {}, TOLD.format("PreconditionFailed").encode())
        else:
            ranged = {"ETag": ETAG, "Content-Range": f"bytes {first}-{last}/{len(OBJECT)}"}
            self._send(handler, 206, ranged, OBJECT[first : last + 1])

    def _send(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        cut = self.cuts.pop(0) if status == 206 and self.cuts else len(body)
        handler.wfile.write(body[:cut])
        if cut < len(body):
            handler.wfile.flush()
            handler.close_connection = True


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyS3]:
    with FaultyS3().running() as server:
        yield server


@pytest.fixture
def server(running: FaultyS3) -> FaultyS3:
    """Shared, since clients for many servers take longer than the tests."""
    running.seen.clear()
    return running


def by(reader: str, endpoint: str, retry_seconds: float = 0.01, **changes: Any) -> Storage:
    storage = Storage(endpoint, "AKIA", "theirs", retry_seconds=retry_seconds, **changes)
    return replace(storage, s3=S3Options(reader=reader))


def outcome(storage: Storage, url: str, length: int | None = 1000) -> Any:
    """What a read gives or raises."""
    try:
        return storage.read(url) if length is None else storage.read_range(url, 0, length)
    except (OSError, StorageError) as error:
        return type(error), str(error)


def is_obstores(headers: dict[str, str]) -> bool:
    return headers["user-agent"].startswith("object_store")


@pytest.mark.parametrize("name", [*ANSWERS, "whole"])
def test_every_answer_means_the_same(server: FaultyS3, name: str) -> None:
    for length in (1000, None):
        expected = outcome(by(S3FS, server.endpoint), f"s3://bucket/a/{name}", length)
        server.seen.clear()

        assert outcome(by(OBSTORE, server.endpoint), f"s3://bucket/a/{name}", length) == expected
        assert is_obstores(server.seen[0])


@pytest.mark.parametrize("name", ["503-SlowDown", "404-NoSuchKey", "412-empty", "416-InvalidRange", "500-text"])
def test_what_obstore_reports_as_s3fs_would_is_not_asked_twice(server: FaultyS3, name: str) -> None:
    """A busy store would get twice as many requests."""
    outcome(by(OBSTORE, server.endpoint, retry_seconds=0), f"s3://bucket/{name}")

    assert [is_obstores(headers) for headers in server.seen] == [True]


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:1", "http://no-such-host.invalid", "https://127.0.0.1:1", "https://no-such.invalid"]
)
def test_a_store_that_is_not_there_is_reported_alike(endpoint: str) -> None:
    expected = outcome(by(S3FS, endpoint), "s3://bucket/a/x y")

    assert expected[0] is UnreachableError and "Could not connect" in expected[1]
    assert outcome(by(OBSTORE, endpoint), "s3://bucket/a/x y") == expected


def test_a_server_that_hangs_up_or_never_answers_is_unreachable(server: FaultyS3) -> None:
    for name in ("silent", "hanging"):
        expected = outcome(by(S3FS, server.endpoint), f"s3://bucket/{name}")
        found = outcome(by(OBSTORE, server.endpoint), f"s3://bucket/{name}")

        assert found[0] is expected[0] is UnreachableError
        assert found[1].partition("(")[0] == expected[1].partition("(")[0]


def certificate(folder: Path) -> Path:
    """Key and certificate of an authority that nobody knows, for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
    named = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    signed = made.add_extension(named, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "pem").write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return folder / "pem"


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[FaultyS3]:
    """A server with TLS."""
    server = FaultyS3()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path))
    server._listener.socket = context.wrap_socket(server._listener.socket, server_side=True)
    server.endpoint = server.endpoint.replace("http", "https")
    with server.running():
        yield server


def test_faults_of_tls_are_reported_alike(server: FaultyS3, secured: FaultyS3) -> None:
    for endpoint in (server.endpoint.replace("http", "https"), secured.endpoint):
        expected = outcome(by(S3FS, endpoint), "s3://bucket/x")

        assert "SSL" in expected[1]
        assert outcome(by(OBSTORE, endpoint), "s3://bucket/x") == expected
    assert not secured.seen


def test_a_store_is_read_whose_authority_botocore_trusts(
    secured: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obstore_bodies, "get_cert_path", lambda verify: str(tmp_path / "pem"))

    assert by(OBSTORE, secured.endpoint).read("s3://bucket/x") == OBJECT
    assert [is_obstores(headers) for headers in secured.seen] == [True]


@pytest.mark.parametrize("length", [len(OBJECT) - 1, len(OBJECT) + 7, None])
def test_a_body_that_breaks_off_is_resumed_at_the_byte_and_of_the_same_version(
    server: FaultyS3, reader: str, length: int | None
) -> None:
    server.cuts = [12_345, 1, 100_001]

    assert outcome(by(reader, server.endpoint, retry_seconds=20), "s3://bucket/x", length) == OBJECT[:length]

    ranges = [headers["range"].removeprefix("bytes=").partition("-")[0] for headers in server.seen]
    assert ranges == ["0", "12345", "12346", "112347"]
    assert [headers.get("if-match") for headers in server.seen] == [None, ETAG, ETAG, ETAG]


def test_another_version_is_refused_and_a_range_behind_the_end_is_empty(server: FaultyS3, reader: str) -> None:
    storage = by(reader, server.endpoint)

    assert storage.read_range("s3://bucket/x", 10, 20, ETAG) == OBJECT[10:30]
    with pytest.raises(StorageError, match="must be the one that was meant"):
        storage.read_range("s3://bucket/x", 10, 20, '"another"')
    assert storage.read_range("s3://bucket/416-InvalidRange", 10**12, 20) == b""


HOSTILE = {
    **{f"AWS_{name}": "true" for name in ("SKIP_SIGNATURE", "REQUEST_PAYER", "S3_EXPRESS", "UNSIGNED_PAYLOAD")},
    **{f"AWS_{name}": "http://127.0.0.1:1" for name in ("ENDPOINT", "ENDPOINT_URL", "ENDPOINT_URL_S3", "PROXY_URL")},
    **{f"AWS_{name}": "another" for name in ("REGION", "SESSION_TOKEN", "TOKEN", "BUCKET", "USER_AGENT", "ROLE_ARN")},
    **{"AWS_TIMEOUT": "1ms", "AWS_READ_TIMEOUT": "1ms", "AWS_ALLOW_HTTP": "false", "AWS_HTTP2_ONLY": "true"},
    **{"AWS_SERVER_SIDE_ENCRYPTION": "sse-c", "AWS_SSE_CUSTOMER_KEY_BASE64": "a" * 43 + "=", "AWS_PROXY_EXCLUDES": ""},
    **dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:1"),
    **{"NO_PROXY": "elsewhere", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false", "AWS_CHECKSUM_ALGORITHM": "sha256"},
}


def test_variables_of_the_process_change_nothing(server: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(region: str) -> dict[str, str]:
        assert by(OBSTORE, server.endpoint, region=region).read("s3://bucket/x") == OBJECT
        return {name: value for name, value in server.seen[-1].items() if name not in ("x-amz-date", "authorization")}

    expected = asked("eu-west-1")
    assert "AKIA" in server.seen[-1]["authorization"] and "eu-west-1" in server.seen[-1]["authorization"]
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)

    assert asked("eu-west-2") == expected  # another value, thus a client of its own
    assert len(server.seen) == 2 and all(is_obstores(headers) for headers in server.seen)
    assert "eu-west-2" in server.seen[-1]["authorization"]


@pytest.mark.parametrize("payer", [False, True])
def test_a_requester_pays_and_its_token_goes_along(server: FaultyS3, payer: bool) -> None:
    storage = by(OBSTORE, server.endpoint, token="session")
    replace(storage, s3=S3Options(reader=OBSTORE, requester_pays=payer)).read("s3://bucket/x")

    (headers,) = server.seen
    assert headers["x-amz-security-token"] == "session" and is_obstores(headers)
    assert headers.get("x-amz-request-payer") == ("requester" if payer else None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ca_bundle": "{own}", "endpoint_url": "https://h"}, r"AWS_CA_BUNDLE: must be unset .*obstore.*s3fs can"),
        ({"ca_bundle": "{own}", "endpoint_url": None}, "AWS_CA_BUNDLE: must be unset"),
        ({"client": (("signature_version", "s3"),)}, "signature_version: must be unset"),
    ],
)
def test_a_setting_that_obstore_does_not_honour_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    own = certificate(tmp_path)
    changes = {name: str(own) if value == "{own}" else value for name, value in changes.items()}
    storage = replace(by(OBSTORE, "http://127.0.0.1:1"), **changes)

    for call in (storage.read, storage.list_names, lambda url: storage.check(url, write=True)):
        with pytest.raises(StorageError, match=says):
            call("s3://bucket/x")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)

    with pytest.raises(StorageError, match=rf"{READER}: needs a package .* `pip install 'convmae-pretrain\[obstore\]'"):
        by(OBSTORE, "http://127.0.0.1:1", region="eu-north-1").read("s3://bucket/x")


def test_threads_read_at_once(server: FaultyS3) -> None:
    storage = by(OBSTORE, server.endpoint, retry_seconds=20)

    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda place: storage.read_range("s3://bucket/x", place, 999), range(0, 200_000, 999)))

    assert b"".join(found) == OBJECT[: len(found) * 999]
    assert all(is_obstores(headers) for headers in server.seen)


FORKING = """
import os, sys, threading
from pipeline.access.s3_options import S3Options
from pipeline.store.storage import Storage

storage = Storage(sys.argv[1], "AKIA", "theirs", retry_seconds=20, s3=S3Options(reader="obstore"))
before = len(storage.read("s3://bucket/parent")) if sys.argv[2] == "used" else 300_000
if not (child := os.fork()):
    os._exit(len(storage.read("s3://bucket/child")) != before)
assert os.waitpid(child, 0)[1] == 0
assert len(storage.read("s3://bucket/parent")) == before
"""


@pytest.mark.parametrize("parent", ["used", "unused"])
def test_a_fork_reads_by_s3fs_where_its_parent_has_used_obstore(server: FaultyS3, parent: str) -> None:
    """Threads of obstore are gone in the child, which would wait for them for ever."""
    subprocess.run([sys.executable, "-c", FORKING, server.endpoint, parent], check=True, timeout=60)

    children = [is_obstores(headers) for headers in server.seen if "child" in headers[":path"]]
    assert children and all(children) == (parent == "unused")


def test_an_interrupt_ends_a_read_that_hangs_when_its_answer_is_given_up(server: FaultyS3) -> None:
    """Not at once, as with s3fs."""
    program = FORKING.partition("before =")[0].replace("=20", "=0.01") + "storage.read('s3://bucket/hanging')"
    reading = subprocess.Popen([sys.executable, "-c", program, server.endpoint], stderr=subprocess.PIPE)
    while not server.seen:
        time.sleep(0.05)
    reading.send_signal(2)

    _, told = reading.communicate(timeout=50)
    assert b"KeyboardInterrupt" in told


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Generic S3 error: a wording of tomorrow",
        "Generic S3 error: Error performing GET http://h/x in 1ms - Server said: 404 Not Found",
        "Generic S3 error: Error performing GET http://h/x in 1ms - Server returned non-2xx status code: 403 Bad: ",
        "Object at location other not found: Error performing GET http://h/x in 1ms - "
        "Server returned non-2xx status code: 404 Not Found: ",
    ],
)
def test_what_is_not_understood_is_left_to_s3fs(text: str) -> None:
    assert obstore_faults.of_s3fs(Exception(text), "key") is None
