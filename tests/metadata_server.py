"""A cloud's metadata service on the loopback address: of an instance (IMDSv2), and of a container."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from itertools import count

from guarded_s3 import GuardedS3, Principal
from loopback_server import LoopbackServer

ROLE = "/latest/meta-data/iam/security-credentials/"
SESSION = "session-of-the-service"
HOUR = 3600.0


@dataclass(frozen=True)
class Issued:
    """Temporary keys of the machine's role."""

    key_id: str
    token: str
    expires: datetime


@dataclass
class MetadataServer(LoopbackServer):
    """Listens while the `with` block runs. Issues one pair of keys at a time, or none."""

    now: Issued | None = None
    """None while the service has no credentials."""
    late_seconds: float = 0.0
    """Before each answer."""
    asked: list[str] = field(default_factory=list)
    """Paths, in order."""

    def __post_init__(self) -> None:
        super().__init__()
        self._numbers = count(1)

    def environment(self) -> dict[str, str]:
        """Environment of a process on an instance of this cloud, with no other credentials to find."""
        nowhere = {"AWS_CONFIG_FILE": "/nonexistent/config", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials"}
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.endpoint, "AWS_REGION": "us-east-1", **nowhere}

    def container_environment(self) -> dict[str, str]:
        """Environment of a process in a container of this cloud."""
        own = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{self.endpoint}/container", "AWS_EC2_METADATA_DISABLED": "true"}
        return {**self.environment(), **own}

    def rotate(self, guard: GuardedS3, *, refusal: str = "InvalidAccessKeyId", lasts_seconds: float = HOUR) -> Issued:
        """Issue new keys, the only ones that the store accepts from now on.

        Args:
            guard: Of the store.
            refusal: What it says of the old ones; empty: it still takes them.
            lasts_seconds: The new ones.
        """
        number = next(self._numbers)
        issued = Issued(f"ASIA{number:04d}", f"token-{number}", datetime.now(UTC) + timedelta(seconds=lasts_seconds))
        for principal in guard.principals.values():
            principal.refusal = principal.refusal or refusal
        guard.principals[issued.key_id] = Principal(issued.token)
        self.now = issued
        return issued

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(handler.path)
        time.sleep(self.late_seconds)
        body = self._body(handler)
        with contextlib.suppress(OSError):
            handler.send_response(200 if body is not None else 404)
            handler.send_header("Content-Length", str(len(body or b"")))
            handler.end_headers()
            handler.wfile.write(body or b"")

    def _body(self, handler: BaseHTTPRequestHandler) -> bytes | None:
        if handler.command == "PUT":
            return SESSION.encode() if handler.path == "/latest/api/token" else None
        is_container = handler.path == "/container"
        if not is_container and handler.headers.get("x-aws-ec2-metadata-token") != SESSION:
            return None
        issued = self.now
        if issued is None:
            return None if is_container else b""
        if handler.path == ROLE:
            return b"nodes"
        expires = issued.expires.strftime("%Y-%m-%dT%H:%M:%SZ")
        fields = {
            "AccessKeyId": issued.key_id,
            "SecretAccessKey": "theirs",
            "Token": issued.token,
            "Expiration": expires,
        }
        return json.dumps({"Code": "Success", "Type": "AWS-HMAC", **fields}).encode()
