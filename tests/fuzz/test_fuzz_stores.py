"""Answers of stores: listings of odd keys, pages, errors, lengths and ranges that are not as they should be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from fuzzing import Fuzz, reading_only
from hypothesis import strategies as st
from loopback_server import LoopbackServer
from mutations import damaged, texts
from odd_files import picture
from scripted_store import BUCKET, WHOLE, ScriptedStore, Twist

from pipeline.errors import RefusedError, UserError
from pipeline.ingest.source import Sources
from pipeline.ingest.source_reader import SourceReader
from pipeline.ingest.sources import find_sources
from pipeline.store.storage import Storage

Draw = Callable[[st.SearchStrategy[Any]], Any]

OBJECTS = {
    "root/a.jpg": picture(1, "JPEG"),
    "root/b/c.jpg": picture(2, "JPEG"),
    "root/0.tar": bytes(range(256)) * 40,
    "root/empty": b"",
}


@pytest.fixture
def store() -> Iterator[ScriptedStore]:
    with ScriptedStore().running() as running:
        yield running


def reached(store: ScriptedStore) -> Storage:
    return Storage(store.endpoint, "key", "secret", region="us-east-1", retry_seconds=0.0)


class Tripwire(LoopbackServer):
    """A server that nothing has a reason to ask."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(handler.path)
        handler.send_response(200)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


# Listings


def odd_keys(secret: Path, tripwire: str) -> st.SearchStrategy[str]:
    """Keys below a prefix, some of which spell a path or an address; long, since it lists them."""
    odd = st.sampled_from(
        (
            "",
            "/",
            "//",
            "x/",
            "cats/",
            f"/{secret}",
            str(secret),
            f"file://{secret}",
            f"{tripwire}/a.jpg",
            f"x/{tripwire}/a.jpg",
            "../other.jpg",
            "a/../b.jpg",
            "./a.jpg",
            "/1.jpg",
            "a//1.jpg",
            "a?versionId=3.jpg",
            "a%2e.jpg",
            "a b.jpg",
            "a+b.jpg",
            "a#b.jpg",
            "a;b,c.jpg",
            "~/a.jpg",
            "caf\u00e9.jpg",
            "\U0001f642.jpg",
            "a\nb.jpg",
            "a\\b.jpg",
            "{1,2}.jpg",
            "*.jpg",
            "[a].jpg",
            ".hidden.jpg",
            "x" * 200 + ".jpg",
        )
    )
    named = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12).map(
        lambda text: f"{text}.jpg"
    )
    return st.one_of(
        odd, named, texts.filter(lambda text: len(text) < 500 and text.isprintable()).map(lambda text: f"{text}.jpg")
    )


def test_what_a_store_lists_is_read_from_below_its_root_alone(fuzz: Fuzz, store: ScriptedStore, tmp_path: Path) -> None:
    secret = tmp_path / "private" / "secret.jpg"
    secret.parent.mkdir()
    secret.write_bytes(picture(9, "JPEG"))
    nothing = tmp_path / "nothing"
    nothing.mkdir()

    with Tripwire().running() as tripwire:

        def listed_keys(names: list[str]) -> None:
            objects = {f"root/{name}": f"content of {name}".encode() for name in names}
            store.tell({**objects, "other.jpg": b"not below the root"}, [])
            storage = reached(store)
            with reading_only(nothing):
                sizes = storage.list_files(f"s3://{BUCKET}/root")
                found = find_sources(storage, f"s3://{BUCKET}/root")
                assert isinstance(found, Sources)
                reader = SourceReader(storage, found.root)
                read = []
                for source in found.images:
                    with contextlib.suppress(FileNotFoundError, RefusedError):
                        read.append((source, reader.read(source)))
            assert not tripwire.asked, "a key was taken for an address"
            contents = [data for _, data in read]
            assert len(set(contents)) == len(contents) and set(contents) <= set(objects.values())
            assert all(objects[f"root/{source.path}"] == data for source, data in read), "a name gave another object"
            lost = {str(source.path) for source in found.images} - {str(source.path) for source, _ in read}
            assert all("\0" in path or {".", ".."} & {*path.split("/")} for path in lost), (
                f"not read, though listed: {lost}"
            )
            assert all(sizes[str(source.path)] == len(data) for source, data in read)

        fuzz(listed_keys, st.lists(odd_keys(secret, tripwire.endpoint), min_size=1, max_size=5, unique=True), batch=40)


# Answers

STATUSES = (
    200,
    204,
    206,
    301,
    304,
    307,
    400,
    401,
    403,
    404,
    405,
    409,
    410,
    411,
    412,
    416,
    418,
    429,
    451,
    500,
    501,
    502,
    503,
    504,
    507,
    599,
)
CODES = (
    "",
    "NoSuchKey",
    "NoSuchBucket",
    "SlowDown",
    "AccessDenied",
    "InvalidRange",
    "ExpiredToken",
    "InternalError",
    "PermanentRedirect",
    "x" * 5000,
    "a\nb",
    "<b>",
)
HEADERS = ("content-length", "etag", "content-range", "last-modified", "content-type", "accept-ranges")
VALUES = (
    "",
    "0",
    "-1",
    "x",
    "bytes 0-0/1",
    "bytes 5-9/10",
    "bytes */*",
    '"other"',
    'W/"x"',
    "gzip",
    "chunked",
    str(2**70),
    "text/html",
)


@st.composite
def twists(draw: Draw) -> Twist:  # noqa: PLR0911 (one a kind)
    """One answer with a fault."""
    match draw(st.sampled_from(("whole", "status", "headers", "length", "body", "cut", "closed", "pages"))):
        case "status":
            return Twist(status=draw(st.sampled_from(STATUSES)), code=draw(st.sampled_from(CODES)))
        case "headers":
            put = draw(
                st.dictionaries(
                    st.sampled_from((*HEADERS[1:], "content-encoding", "location", "x-amz-request-id")),
                    st.sampled_from(VALUES),
                    max_size=2,
                )
            )
            return Twist(without=frozenset(draw(st.lists(st.sampled_from(HEADERS), max_size=2))), headers=put)
        case "length":
            return Twist(more_length=draw(st.sampled_from((-1, 1, -100, 100, 2**40))))
        case "body":
            keys = b"<Contents><Key>k</Key><Size>x</Size></Contents><IsTruncated>false</IsTruncated>"
            xml = b'<?xml version="1.0"?><ListBucketResult>' + keys + b"</ListBucketResult>"
            return Twist(
                body=draw(
                    st.one_of(
                        st.sampled_from(
                            (b"", b"<", b"<a/>", b"<html>no</html>", b'<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>', xml)
                        ),
                        damaged(xml),
                    )
                )
            )
        case "cut":
            return Twist(cut=True)
        case "closed":
            return Twist(closed=True)
        case "pages":
            return Twist(
                page_keys=draw(st.integers(1, 3)),
                is_reversed=draw(st.booleans()),
                token=draw(st.sampled_from((None, None, "", "0", "x", "1"))),
            )
    return WHOLE


calls = st.sampled_from(
    ("list_names", "list_files", "read", "read_range", "read_start", "size", "etag", "exists", "check", "find_sources")
)
keys = st.sampled_from((*OBJECTS, "root", "root/nothing"))


def call(storage: Storage, name: str, url: str) -> Any:
    """One method, on one URL."""
    match name:
        case "read_range":
            return storage.read_range(url, 100, 50)
        case "read_start":
            return storage.read_start(url, 64)
        case "check":
            return storage.check(url, write=False)
        case "find_sources":
            return find_sources(storage, url)
    return getattr(storage, name)(url)


def expected_bytes(name: str, data: bytes) -> bytes | None:
    """What a method that reads must give of an object."""
    return {"read": data, "read_range": data[100:150], "read_start": data[:64]}.get(name)


def check_answer(store: ScriptedStore, name: str, url: str, key: str, trusts_length: bool) -> None:
    """A value of the right type, or an exception that is promised; bytes that were read are the object's."""
    storage = reached(store)
    try:
        found = call(storage, name, url)
    except UserError:
        raise
    except OSError as error:
        assert str(error), "an error that says nothing"
        return
    wanted = expected_bytes(name, OBJECTS.get(key, b""))
    if wanted is not None:
        assert isinstance(found, bytes)
        assert not trusts_length or found == wanted, f"{len(found)} bytes that are not those of the object"
    elif name == "list_names":
        assert all(isinstance(item, str) and item for item in found)
    elif name == "list_files":
        assert all(isinstance(path, str) and isinstance(size, int) for path, size in found.items())
    elif name == "size":
        assert type(found) is int and found >= 0
    elif name == "etag":
        assert found is None or isinstance(found, str)
    elif name == "exists":
        assert found in (True, False)


def _tells_truth(twist: Twist) -> bool:
    """Whether an answer, as far as it is taken for one, holds the object's bytes, or can be seen not to."""
    return twist.body is None and not twist.code and twist.more_length >= 0 and "content-length" not in twist.without


def answer_as_scripted(store: ScriptedStore, root: str, given: tuple[str, str, list[Twist]], nothing: Path) -> None:
    """Make one call to a server that twists its answers."""
    name, key, script = given
    store.tell(OBJECTS, script)
    with reading_only(nothing):
        check_answer(store, name, f"{root}/{key}", key, all(map(_tells_truth, script)))
    assert store.requests < 50


def test_an_s3_server_may_answer_anything(fuzz: Fuzz, store: ScriptedStore, tmp_path: Path) -> None:
    def s3_answers(given: tuple[str, str, list[Twist]]) -> None:
        answer_as_scripted(store, f"s3://{BUCKET}", given, tmp_path)

    fuzz(s3_answers, st.tuples(calls, keys, st.lists(twists(), max_size=3)), batch=60)


def test_a_web_server_may_answer_anything(fuzz: Fuzz, store: ScriptedStore, tmp_path: Path) -> None:
    def web_answers(given: tuple[str, str, list[Twist]]) -> None:
        answer_as_scripted(store, store.endpoint, given, tmp_path)

    web = calls.filter(lambda name: name not in ("list_names", "list_files"))
    fuzz(web_answers, st.tuples(web, keys, st.lists(twists(), max_size=3)), batch=60)
