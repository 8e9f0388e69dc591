"""Requests through the user's proxy: decided for each URL, and seen by a proxy that counts them."""

from __future__ import annotations

import http.server
import pickle
import threading
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forward_proxy import ForwardProxy
from hypothesis import given
from hypothesis import strategies as st

from pipeline.access.proxies import LOOPBACK, Proxies, is_loopback, without_loopback
from pipeline.access.s3_options import READER
from pipeline.errors import StorageError, UnreachableError
from pipeline.ingest.source import Sources
from pipeline.ingest.source_lists import sized
from pipeline.ingest.sources import find_sources
from pipeline.store.storage import Storage

P, Q = "http://proxy.test:3128", "http://other.test:8080"
NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("variables", "url", "expected"),
    [
        ({"HTTP_PROXY": P}, "http://photos.test/a.jpg", P),
        ({"http_proxy": P}, "http://photos.test/a.jpg", P),
        ({"http_proxy": P, "HTTP_PROXY": Q}, "http://photos.test/a.jpg", P),
        ({"http_proxy": "", "HTTP_PROXY": Q}, "http://photos.test/a.jpg", None),
        ({"HTTP_PROXY": ""}, "http://photos.test/a.jpg", None),
        ({"HTTP_PROXY": P}, "https://photos.test/a.jpg", None),
        ({"HTTPS_PROXY": P}, "https://photos.test/a.jpg", P),
        ({"HTTPS_PROXY": P, "HTTP_PROXY": Q}, "https://photos.test/a.jpg", P),
        ({"ALL_PROXY": P}, "https://photos.test/a.jpg", P),
        ({"all_proxy": P, "HTTP_PROXY": Q}, "http://photos.test/a.jpg", Q),
        ({"HTTP_PROXY": "proxy.test:3128"}, "http://photos.test/a.jpg", P),
        ({"HTTP_PROXY": P, "NO_PROXY": "*"}, "http://photos.test/a.jpg", None),
        ({"HTTP_PROXY": P, "NO_PROXY": "x.test, photos.test"}, "http://photos.test/a.jpg", None),
        ({"HTTP_PROXY": P, "no_proxy": ".test"}, "http://photos.test/a.jpg", None),
        ({"HTTP_PROXY": P, "no_proxy": "*.test"}, "http://photos.test/a.jpg", None),
        ({"HTTP_PROXY": P, "NO_PROXY": "otos.test"}, "http://photos.test/a.jpg", P),
        ({"HTTP_PROXY": P, "NO_PROXY": "photos.test:81"}, "http://photos.test/a.jpg", P),
        ({"HTTP_PROXY": P, "NO_PROXY": "photos.test:80"}, "http://photos.test/a.jpg", None),
        ({"HTTP_PROXY": P, "NO_PROXY": "10.0.0.0/8"}, "http://10.1.2.3/a.jpg", None),
        ({"HTTP_PROXY": P, "NO_PROXY": "10.0.0.0/8"}, "http://11.1.2.3/a.jpg", P),
        ({"HTTP_PROXY": P, "NO_PROXY": "fd00::/8"}, "http://[fd12::1]:9000/a.jpg", None),
        ({"HTTP_PROXY": P, "NO_PROXY": "[fd12::1]:9000"}, "http://[fd12::1]:9000/a.jpg", None),
        ({"HTTP_PROXY": P, "NO_PROXY": "10.1.2.3"}, "http://10.1.2.3:9000/a.jpg", None),
    ],
)
def test_a_url_goes_as_the_variables_say(variables: dict[str, str], url: str, expected: str | None) -> None:
    assert Proxies.from_environment(variables).for_url(url) == expected


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.2", "127.255.255.254", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_this_machine_is_asked_directly_whatever_they_say(scheme: str, host: str) -> None:
    everything = Proxies.from_environment({"HTTP_PROXY": P, "HTTPS_PROXY": P, "ALL_PROXY": P, "NO_PROXY": "x.test"})

    assert everything.for_url(f"{scheme}://{host}:9000/x") is None
    assert everything.for_endpoint(f"{scheme}://{host}:9000") == {}
    assert everything.for_url(f"{scheme}://localhost:9000/x") is None
    assert everything.for_url(f"{scheme}://LOCALHOST./x") is None
    assert everything.for_url(f"{scheme}://localhost.test/x") == P
    assert everything.for_url(f"{scheme}://127.test/x") == P and not is_loopback("128.0.0.1")


label = st.text("abz09", min_size=1, max_size=3)
name = st.lists(label, min_size=1, max_size=3).map(lambda labels: ".".join([*labels, "test"]))


@given(host=name, listed=st.lists(st.builds("{}{}".format, st.sampled_from(["", "."]), name | label), max_size=4))
def test_names_in_no_proxy_mean_what_they_mean_to_python(host: str, listed: list[str]) -> None:
    text = ", ".join(listed)
    expected = bool(urllib.request.proxy_bypass_environment(host, {"no": text}))

    assert (Proxies(http=P, no_proxy=text).for_url(f"http://{host}/x") is None) == expected


@pytest.mark.parametrize(
    "environ",
    [{}, {"NO_PROXY": "a.test"}, {"no_proxy": "a.test", "NO_PROXY": "b.test, 127.0.0.1"}, {"NO_PROXY": ""}],
)
def test_what_others_read_has_the_loopback_addresses_and_all_that_was_there(environ: dict[str, str]) -> None:
    merged = without_loopback(environ)

    assert merged["NO_PROXY"] == merged["no_proxy"]
    entries = merged["NO_PROXY"].split(",")
    assert {*LOOPBACK} <= {*entries} and len(entries) == len({*entries})
    for name in ("a.test", "b.test"):
        assert (name in entries) == (name in "".join(environ.values()))
    assert urllib.request.proxy_bypass_environment("127.0.0.1:80", {"no": merged["no_proxy"]})
    assert without_loopback(merged) == merged, "a child that merges again changes nothing"


def test_a_star_stays_alone() -> None:
    assert without_loopback({"NO_PROXY": "*"})["no_proxy"] == "*", "with others beside it urllib takes it for a name"


@pytest.mark.parametrize("text", ["socks5://user:word@proxy.test:1080", "http://:3128", "http://proxy.test:port", "//"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_what_is_no_http_proxy_is_named_where_it_would_be_used(variable: str, text: str) -> None:
    proxies = Proxies.from_environment({variable: text})

    with pytest.raises(StorageError, match=f"^{variable}: must be the address of an HTTP proxy") as caught:
        proxies.for_url("http://photos.test/a.jpg")
    assert "word" not in str(caught.value)
    assert proxies.for_url("http://127.0.0.1/a.jpg") is None


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """HOST:PORT of a web server with one image, and a redirect to it by its loopback address."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jpg").write_bytes(b"an image")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "web"))

        def do_GET(self) -> None:
            if self.path == "/moved.jpg":
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{server.server_port}/a.jpg")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(web: str) -> Iterator[ForwardProxy]:
    with ForwardProxy(hosts={"photos.test": web}).running() as proxy:
        yield proxy


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_images_of_web_servers_come_through_the_proxy(
    proxy: ForwardProxy, web: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy.endpoint)
    storage = Storage(retry_seconds=3)

    assert storage.read_start("http://photos.test/a.jpg", 100) == b"an image"
    assert storage.size("http://photos.test/a.jpg") == 8
    assert ("GET", "http://photos.test/a.jpg") in proxy.asked
    proxy.asked.clear()
    assert storage.read_start(f"http://{web}/a.jpg", 100) == b"an image"
    assert storage.size(f"http://{web}/a.jpg") == 8
    assert proxy.asked == [], "loopback"
    assert storage.read_start("http://photos.test/moved.jpg", 100) == b"an image"
    assert proxy.asked == [("GET", "http://photos.test/moved.jpg")], "each redirect goes its own way"


def test_a_list_of_web_addresses_is_read_through_it(
    proxy: ForwardProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.txt").write_text("http://photos.test/a.jpg\n")
    monkeypatch.setenv("HTTP_PROXY", proxy.endpoint)
    found = find_sources(Storage(), str(tmp_path / "list.txt"))
    assert isinstance(found, Sources)
    (size,) = [source.size_bytes for source in sized(Storage(), found).images]
    assert size == 8 and {asked for _, asked in proxy.asked} == {"http://photos.test/a.jpg"}


def test_the_callers_proxy_travels_and_its_exceptions_too(proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    given = pickle.dumps(Storage.from_environment({"HTTP_PROXY": proxy.endpoint}))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # of the process that it comes to

    assert pickle.loads(given).read_start("http://photos.test/a.jpg", 100) == b"an image"
    exempt = Storage.from_environment({"HTTP_PROXY": proxy.endpoint, "NO_PROXY": "photos.test"})
    proxy.asked.clear()
    with pytest.raises(UnreachableError):
        replace(exempt, retry_seconds=0.2).read_start("http://photos.test/a.jpg", 100)
    assert proxy.asked == []


def test_a_tunnel_is_asked_for_where_the_address_is_https(proxy: ForwardProxy) -> None:
    storage = replace(Storage.from_environment({"HTTPS_PROXY": proxy.endpoint}), retry_seconds=0.2)

    with pytest.raises((OSError, UnreachableError)):
        storage.read_start("https://no-such.test/a.jpg", 100)
    assert {*proxy.asked} == {("CONNECT", "no-such.test:443")}


def test_a_proxy_gets_its_password_and_says_when_it_wants_one(proxy: ForwardProxy) -> None:
    proxy.authorization = "Basic " + b64encode(b"me:word").decode()
    address = proxy.endpoint.removeprefix("http://")
    known = Storage.from_environment({"HTTP_PROXY": f"http://me:word@{address}"})

    assert known.read_start("http://photos.test/a.jpg", 100) == b"an image"
    assert "word" not in repr(known)
    with pytest.raises(StorageError, match=r"^HTTP_PROXY: must let this request pass"):
        Storage.from_environment({"HTTP_PROXY": proxy.endpoint}).read_start("http://photos.test/a.jpg", 100)


STORE = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_ENDPOINT_URL": "http://store.test"}


def test_a_store_behind_a_proxy_with_a_password(proxy: ForwardProxy, open_s3: Storage) -> None:
    proxy.hosts["store.test"] = str(open_s3.endpoint_url).removeprefix("http://")
    proxy.authorization = "Basic " + b64encode(b"me:word").decode()
    address = proxy.endpoint.removeprefix("http://")

    assert (
        Storage.from_environment({**STORE, "HTTP_PROXY": f"http://me:word@{address}"}).list_names("s3://bucket/none")
        == []
    )
    assert proxy.asked
    with pytest.raises(StorageError, match=r"^HTTP_PROXY: must let this request pass"):
        Storage.from_environment({**STORE, "HTTP_PROXY": proxy.endpoint}).list_names("s3://bucket/none")


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_store_is_reached_through_it_by_a_name_that_it_alone_knows(
    proxy: ForwardProxy, open_s3: Storage, variable: str, reader: str
) -> None:
    proxy.hosts["store.test"] = str(open_s3.endpoint_url).removeprefix("http://")
    store = {**STORE, READER: reader, variable: proxy.endpoint}
    storage = Storage.from_environment(store)
    url = f"s3://bucket/through/{variable}/{reader}"

    storage.write(url, b"data")
    assert storage.read(url) == b"data" and open_s3.read(url) == b"data"
    assert {method for method, asked in proxy.asked if asked.startswith("http://store.test/bucket/")} == {"PUT", "GET"}
    proxy.asked.clear()
    direct = Storage.from_environment({**store, "AWS_ENDPOINT_URL": str(open_s3.endpoint_url)})
    assert direct.read(url) == b"data" and proxy.asked == [], "loopback"


def test_a_store_whose_name_is_exempt_is_not_asked_for_there(proxy: ForwardProxy) -> None:
    variables = {**STORE, "HTTP_PROXY": proxy.endpoint, "NO_PROXY": "store.test"}

    with pytest.raises(UnreachableError, match="must be reachable"):
        replace(Storage.from_environment(variables), retry_seconds=0.2).read("s3://bucket/x")
    assert proxy.asked == []
