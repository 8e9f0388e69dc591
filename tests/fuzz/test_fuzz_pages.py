"""What a browser, or somebody in its place, sends to a page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any
from wsgiref.util import setup_testing_defaults

from fuzzing import Fuzz
from hypothesis import strategies as st
from mutations import texts

from jobs.report.live.live_parts import LiveParts
from jobs.report.live.page_app import PageApp
from jobs.report.live.page_token import Guard, is_loopback

TOKEN = "a-token-of-the-run_0123456789-abcdef"
COOKIE = Guard(TOKEN, "").cookie_name
PIECES = (
    TOKEN,
    TOKEN[:-1],
    COOKIE,
    "convmae-",
    "=",
    ";",
    ",",
    "&",
    "token",
    "have",
    "Bearer ",
    "%",
    "%00",
    "\xff",
    '"',
    "//",
)
words = st.lists(st.one_of(st.sampled_from(PIECES), texts.map(lambda text: text[:40])), max_size=6).map("".join)
sent = st.fixed_dictionaries(
    {
        "REQUEST_METHOD": st.sampled_from(("GET", "HEAD", "POST", "OPTIONS", "")),
        "PATH_INFO": st.one_of(st.sampled_from(("/", "/parts")), words),
        "QUERY_STRING": words,
        "HTTP_COOKIE": words,
        "HTTP_AUTHORIZATION": words,
        "HTTP_HOST": st.one_of(st.sampled_from(("localhost", "127.0.0.1:80", "[::1]:80", "[", "")), words),
    }
)


class Nothing:
    """Draws nothing."""

    def draw(self) -> Iterable[Any]:
        return ()

    def close(self) -> None:
        pass


PAGE = PageApp("a run", ("header",), LiveParts(Nothing, "fuzz"))


def answered(token: str, environ: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    found: list[tuple[int, dict[str, str]]] = []
    whole = dict(environ)
    setup_testing_defaults(whole)

    def start(status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
        found.append((int(status[:3]), dict(headers)))

    body = b"".join(Guard(token, "").protects(PAGE)(whole, start))
    ((status, headers),) = found
    assert not {"\r", "\n"} & set("".join(headers.values())), "a header that could be another's"
    return status, headers, body


def test_only_who_has_the_token_sees_a_page(fuzz: Fuzz) -> None:
    def requests_with_tokens(environ: dict[str, Any]) -> None:
        status, headers, body = answered(TOKEN, environ)
        said = f"{environ['QUERY_STRING']} {environ['HTTP_COOKIE']} {environ['HTTP_AUTHORIZATION']}"
        assert status in (200, 303, 401, 404, 405)
        assert status == 401 or TOKEN in said, "without the token"
        assert headers.get("Location", "./") == "./"
        if status == 200 and environ["PATH_INFO"] == "/parts":
            assert json.loads(body)["parts"] == {}

    fuzz(requests_with_tokens, sent, batch=200)


def test_without_a_token_only_a_host_of_this_machine_is_answered(fuzz: Fuzz) -> None:
    def requests_by_hosts(environ: dict[str, Any]) -> None:
        status, _, _ = answered("", environ)
        host = environ["HTTP_HOST"]
        name = host[: host.index("]") + 1] if host[:1] == "[" and "]" in host else host.split(":")[0]
        assert (status == 403) != is_loopback(name)

    fuzz(requests_by_hosts, sent, batch=200)
