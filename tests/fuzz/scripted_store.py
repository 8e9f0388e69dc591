"""An S3 server and a web server over a few objects, whose answers are twisted as a test says."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from loopback_server import LoopbackServer

BUCKET = "bucket"


@dataclass(frozen=True)
class Twist:
    """A fault in one answer."""

    status: int | None = None
    """In place of the right one."""
    code: str = ""
    """Of an error's XML."""
    without: frozenset[str] = frozenset()
    """Headers, in lower case, that are omitted."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """That are put in place of the right ones."""
    more_length: int = 0
    """Added to Content-Length."""
    body: bytes | None = None
    """In place of the right one."""
    cut: bool = False
    """Whether the connection ends in the middle of the body."""
    closed: bool = False
    """Whether it ends before any answer."""
    page_keys: int = 1000
    """Of a listing: keys in a page."""
    is_reversed: bool = False
    """Of a listing: keys in the wrong order."""
    token: str | None = None
    """Of a listing: said to follow, whatever does."""


WHOLE = Twist()


class ScriptedStore(LoopbackServer):
    """Serves `objects` by key; the answers to the next requests are twisted by `script`, in turn, and then whole."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self.script: list[Twist] = []
        self.requests = 0

    def tell(self, objects: Mapping[str, bytes], script: list[Twist]) -> None:
        """Start over."""
        self.objects, self.script, self.requests = dict(objects), list(script), 0

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """One request."""
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.requests += 1
        twist = self.script.pop(0) if self.script else WHOLE
        if twist.closed:
            handler.close_connection = True
            return
        parts = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        key = unquote(parts.path).removeprefix(f"/{BUCKET}").removeprefix("/")
        if not key and handler.command == "GET":
            status, headers, body = self._listing(query, twist)
        else:
            status, headers, body = self._object(key, handler)
        self._answer(handler, twist, status, headers, body)

    def _listing(self, query: Mapping[str, str], twist: Twist) -> tuple[int, dict[str, str], bytes]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start = query.get("continuation-token", "")
        rows: dict[str, int | None] = {}
        for key, data in sorted(self.objects.items(), key=lambda item: item[0].encode("utf-8", "surrogatepass")):
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                rows[prefix + rest.partition(delimiter)[0] + delimiter] = None
            else:
                rows[key] = len(data)
        names = list(rows)
        first = int(start) if start.isdigit() else 0
        most = min(twist.page_keys, int(query.get("max-keys", 1000)))
        page = names[first : first + most]
        follows = first + most < len(names)
        token = twist.token if twist.token is not None else str(first + most) if follows else None
        encoded = quote if query.get("encoding-type") == "url" else escape
        pieces = [
            f"<CommonPrefixes><Prefix>{encoded(name)}</Prefix></CommonPrefixes>"
            if rows[name] is None
            else f"<Contents><Key>{encoded(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;e&quot;</ETag><Size>{rows[name]}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for name in (reversed(page) if twist.is_reversed else page)
        ]
        following = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{encoded(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<EncodingType>url</EncodingType><IsTruncated>{'true' if token is not None else 'false'}</IsTruncated>"
            f"{following}{''.join(pieces)}</ListBucketResult>"
        )
        return 200, {"Content-Type": "application/xml"}, body.encode("utf-8", "surrogatepass")

    def _object(self, key: str, handler: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        data = self.objects.get(key)
        if data is None:
            return 404, {"Content-Type": "application/xml"}, b"" if handler.command == "HEAD" else _error("NoSuchKey")
        headers = {
            "ETag": f'"{len(data):x}-{sum(data):x}"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        if not asked:
            return 200, headers, data
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return 416, headers, _error("InvalidRange")
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]

    def _answer(
        self, handler: BaseHTTPRequestHandler, twist: Twist, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        status = twist.status or status
        body = _error(twist.code) if twist.code else body
        body = twist.body if twist.body is not None else body
        headers = {"Content-Length": str(max(0, len(body) + twist.more_length)), **headers, **twist.headers}
        with contextlib.suppress(OSError, ValueError, UnicodeError):
            handler.send_response(status)
            for name, value in headers.items():
                if name.lower() not in twist.without:
                    handler.send_header(name, value)
            handler.end_headers()
            if handler.command != "HEAD":
                handler.wfile.write(body[: len(body) // 2] if twist.cut else body)
            if twist.cut or twist.more_length > 0 or "content-length" in twist.without:
                handler.wfile.flush()
                handler.close_connection = True


def _error(code: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>no</Message></Error>'.encode()
