"""A proxy before a real S3 server that guards it as AWS does: it knows keys and tokens, and holds calls to policies.

Every process that works on the store comes through it, so that what it has seen is all that was asked. Requests that
it lets through are signed anew with the server's own key.
"""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from iam_policy import Call, Grant, Need, Policy
from loopback_server import LoopbackServer

from pipeline.store.storage import Storage

KMS_HEADERS = (
    "x-amz-server-side-encryption",
    "x-amz-server-side-encryption-aws-kms-key-id",
    "x-amz-server-side-encryption-bucket-key-enabled",
)
_NOT_PASSED_ON = {
    *("host", "authorization", "connection", "expect", "content-length", "accept-encoding", "proxy-connection"),
    *("x-amz-date", "x-amz-content-sha256", "x-amz-security-token", "x-amz-request-payer"),
    *KMS_HEADERS,  # the real server has no KMS
}


@dataclass
class Principal:
    """The owner of a key."""

    token: str = ""
    """Session token that must come with the key; empty if none may."""
    policies: tuple[Policy, ...] | None = None
    """What the owner may do; None for everything."""
    refusal: str = ""
    """S3's error code, if the key is no longer accepted."""


@dataclass(frozen=True)
class Seen:
    """A request and its result."""

    call: Call
    headers: Mapping[str, str]
    """By lower-case name."""
    host: str
    path: str
    key_id: str
    refused: str
    """S3's error code; empty if it was passed on."""


@dataclass
class GuardedS3(LoopbackServer):
    """Listens on the loopback address while the `with` block runs. Its fields may be changed meanwhile."""

    server: Storage
    """How to reach the real one."""
    principals: dict[str, Principal] = field(default_factory=dict)
    """By access key id; other keys are unknown."""
    domain: str = ""
    """Whose subdomains are buckets."""
    kms_key: str = ""
    """ARN of the key with which everything is encrypted; empty if nothing is."""
    meddle: Callable[[Call, Mapping[str, str]], tuple[int, str] | None] = lambda call, headers: None
    """Called before a request is passed on; a status and code that it returns are the answer."""
    seen: list[Seen] = field(default_factory=list)
    used: set[Grant] = field(default_factory=set)
    """The parts of the policies that were needed."""
    denied: list[Need] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._upstream = urlsplit(str(self.server.endpoint_url))
        keys = Credentials(self.server.key, self.server.secret)
        self._signer = S3SigV4Auth(keys, "s3", self.server.region)

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        asked = urlsplit(handler.path)  # an absolute one where this is used as a web proxy
        host = asked.hostname or headers["host"].partition(":")[0]
        path = asked.path
        if self.domain and host.endswith(f".{self.domain}"):
            path = f"/{host.removesuffix(f'.{self.domain}')}{path}"
        call = Call.of(handler.command, unquote(path), asked.query)
        key_id = headers.get("authorization", "").partition("Credential=")[2].partition("/")[0]
        refusal = self._refusal(call, headers, key_id) or self.meddle(call, headers)
        if not refusal:
            answer = self._passed_on(handler.command, path + (f"?{asked.query}" if asked.query else ""), headers, body)
            is_missing = answer[0] == 404 and call.operation in ("GetObject", "HeadObject")
            refusal = self._denial(call, key_id, is_missing=True) if is_missing else None
        self.seen.append(Seen(call, headers, host, asked.path, key_id, refusal[1] if refusal else ""))
        status, told, data = _refusal(*refusal) if refusal else answer
        self._answer(handler, status, told, data)

    def _refusal(self, call: Call, headers: Mapping[str, str], key_id: str) -> tuple[int, str] | None:
        if not key_id:
            return 403, "AccessDenied"
        principal = self.principals.get(key_id)
        if principal is None:
            return 403, "InvalidAccessKeyId"
        if principal.refusal:
            return 400 if principal.refusal == "ExpiredToken" else 403, principal.refusal
        if headers.get("x-amz-security-token", "") != principal.token:
            return 400, "InvalidToken"
        return self._denial(call, key_id)

    def _denial(self, call: Call, key_id: str, *, is_missing: bool = False) -> tuple[int, str] | None:
        policies = self.principals[key_id].policies
        if policies is None:
            return None
        for need in call.needs(is_missing=is_missing, kms_key=self.kms_key):
            granting = [grant for policy in policies for grant in policy.granting(need)]
            if not granting:
                self.denied.append(need)
                return 403, "AccessDenied"
            self.used.update(granting)
        return None

    def _passed_on(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        assert "aws-chunked" not in headers.get("content-encoding", "")
        kept = {name: value for name, value in headers.items() if name not in _NOT_PASSED_ON}
        request = AWSRequest(method, f"{self._upstream.geturl()}{target}", headers=kept, data=body)
        self._signer.add_auth(request)
        connection = http.client.HTTPConnection(str(self._upstream.hostname), self._upstream.port, timeout=30)
        try:
            connection.request(method, target, body=body or None, headers=dict(request.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
        except OSError:
            return _refusal(503, "ServiceUnavailable")
        finally:
            connection.close()
        return answer.status, dict(answer.getheaders()), data

    def _answer(self, handler: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], body: bytes) -> None:
        with contextlib.suppress(OSError):
            handler.send_response(status)
            is_head = handler.command == "HEAD"
            length = headers.get("Content-Length", str(len(body))) if is_head else str(len(body))
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "date", "server", "transfer-encoding"):
                    handler.send_header(name, value)
            handler.send_header("Content-Length", length)
            handler.end_headers()
            if not is_head:
                handler.wfile.write(body)


def _refusal(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    told = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
    return status, {"Content-Type": "application/xml"}, told.encode()
