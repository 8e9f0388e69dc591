"""Who may open a page: anyone on this machine, or who has the token where other machines reach it.

The token of a run lies in its run directory: who can read that knows all that the page shows.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from jobs.errors import RunError
from jobs.run.directory import RunDirectory

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

TOKEN_BYTES = 32


def new_token() -> str:
    """One that nobody guesses."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def run_token(run: RunDirectory, host: str) -> str:
    """What the page of a run asks for when it is served at an address; empty on loopback.

    It outlives drivers, so that an address that somebody has noted stays valid.
    """
    if is_loopback(host):
        return ""
    try:
        token = run.read_page_token()
    except RunError:  # damaged: whoever has the old one asks `convmae status` again
        token = ""
    if not token:
        token = new_token()
        run.write_page_token(token)
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def with_token(url: str, token: str) -> str:
    """The address that opens a page once; the browser keeps a cookie."""
    return f"{url}?token={token}" if token else url


@dataclass(frozen=True)
class Guard:
    """Lets a request pass, or answers it."""

    token: str
    """Empty: requests are answered where their `Host` names this machine, so that no page of another site, whose name
    was made to mean this machine, can read ours."""
    remedy: str
    """Where the token is found."""

    def protects(self, app: WSGIApplication) -> WSGIApplication:
        """The same application, for those who may use it."""

        def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            if not self.token:
                if is_loopback(_host_name(environ)):
                    return app(environ, start_response)
                refusal = "This page answers requests to localhost only. Open it by http://localhost:PORT/."
                return refused(start_response, HTTPStatus.FORBIDDEN, refusal)
            if self._agrees(parse_qs(environ.get("QUERY_STRING", "")).get("token", [""])[0]):
                # A relative address: this folder, whatever a proxy calls it, and never another host.
                kept = f"{self.cookie_name}={self.token}; HttpOnly; SameSite=Lax; Path=/"
                headers = [("Location", "./"), ("Set-Cookie", kept)]
                return refused(start_response, HTTPStatus.SEE_OTHER, "", headers)
            if self._agrees(_bearer(environ)) or self._agrees(self._cookie(environ)):
                return app(environ, start_response)
            headers = [("WWW-Authenticate", "Bearer")]
            return refused(
                start_response, HTTPStatus.UNAUTHORIZED, f"This page asks for a token. {self.remedy}", headers
            )

        return guarded

    def _agrees(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())

    @property
    def cookie_name(self) -> str:
        """Of this token: cookies are of a host, whatever the port, and a host may serve several runs."""
        return f"convmae-{hashlib.sha256(self.token.encode()).hexdigest()[:12]}"

    def _cookie(self, environ: WSGIEnvironment) -> str:
        # By hand: `http.cookies` gives up at the first odd one, which another program on this host may have set.
        pairs = (piece.strip().partition("=") for piece in str(environ.get("HTTP_COOKIE", "")).split(";"))
        return next((value for name, _, value in pairs if name == self.cookie_name), "")


def refused(
    start_response: StartResponse, status: HTTPStatus, text: str, headers: Iterable[tuple[str, str]] = ()
) -> list[bytes]:
    """An answer without a page."""
    plain = [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")]
    start_response(f"{status.value} {status.phrase}", [*plain, *headers, ("Referrer-Policy", "no-referrer")])
    return [f"{text}\n".encode()]


def _host_name(environ: WSGIEnvironment) -> str:
    """Of the `Host` that the request names, without its port."""
    host = str(environ.get("HTTP_HOST", ""))
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


def _bearer(environ: WSGIEnvironment) -> str:
    kind, _, token = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""
