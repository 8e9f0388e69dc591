"""URLs and paths as people write them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from fuzzing import Fuzz, reading_only
from hypothesis import strategies as st
from mutations import texts

from pipeline.access.places import Given, Listed, normal
from pipeline.access.urls import is_local, is_s3, is_web, path_of, protocol_of, server_of
from pipeline.ingest.source import parted, suffix
from pipeline.store.storage import Storage

PROTOCOLS = (
    "",
    "file://",
    "local://",
    "memory://",
    "s3://",
    "s3a://",
    "S3://",
    "http://",
    "https://",
    "gs://",
    "az://",
    "abfs://",
    "sftp://",
    "ftp://",
    "hf://",
    "s3:/",
    "s3:",
    "zip://",
    "simplecache::s3://",
    "gopher://",
    "://",
    "file:///",
    "file:",
    "//",
    "~/",
    "./",
    "../",
)
PIECES = (
    "bucket",
    "a",
    "b.jpg",
    "/",
    "/",
    "//",
    ".",
    "..",
    "~",
    " ",
    "%20",
    "%2F",
    "?",
    "?versionId=3",
    "#",
    "@",
    ":",
    "user:pass@",
    "host:99999",
    "[::1]",
    "[",
    "]",
    "*",
    "{1,2}",
    "\\",
    "\u00e9",
    "\U0001f642",
    "\0",
    "\n",
    "x" * 300,
)

urls = st.tuples(
    st.sampled_from(PROTOCOLS),
    st.lists(st.one_of(st.sampled_from(PIECES), texts.filter(lambda text: len(text) < 50)), max_size=6),
).map(lambda pair: pair[0] + "".join(pair[1]))
FREE_OF_PACKAGES = ("file", "local", "memory", "s3", "s3a", "http", "https")


def test_an_address_means_one_place_or_is_refused(fuzz: Fuzz, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def addresses(url: str) -> None:
        with reading_only(tmp_path):
            place = normal(url)
            assert normal(place) == place, "a normal form has another"
            meant = Given(url).url(str(tmp_path))
        assert [is_local(place), is_s3(place), is_web(place)].count(True) <= 1
        for made in (suffix(url), *parted(url), Storage.join(url, "x")):
            assert isinstance(made, str)
        assert protocol_of(place) == protocol_of(meant)
        if protocol_of(place) in FREE_OF_PACKAGES:
            assert isinstance(path_of(place), str) and isinstance(server_of(place), tuple)
        if is_local(place):
            assert Path(place).is_absolute() and not {".", "..", "~"} & {*place.split("/")}
        elif not is_web(place):
            assert not place.endswith("/") or place.endswith("://")

    fuzz(addresses, urls, batch=200)


ROOTS = (
    "s3://bucket/root",
    "s3://bucket",
    "memory://root",
    "http://127.0.0.1:1/root",
    "/nonexistent/root",
    "file:///nonexistent/root",
)


def test_a_listed_name_lies_below_what_was_listed_or_is_refused(fuzz: Fuzz, tmp_path: Path) -> None:
    def listed_names(given: tuple[str, str]) -> None:
        root, name = given
        with reading_only(tmp_path):
            url = Listed(name).url(root)
        assert url == f"{root}/{name}"
        assert path_of(url).startswith(f"{path_of(root)}/"), "it leads out of what was listed"
        assert protocol_of(url) == protocol_of(root)
        assert ".." not in path_of(url).split("/")

    fuzz(listed_names, st.tuples(st.sampled_from(ROOTS), st.one_of(urls, texts)), batch=200)


def test_a_place_on_this_machine_can_be_asked_about(fuzz: Fuzz, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_bytes(b"here")

    def local_places(text: str) -> None:
        url = f"{root}/{text}"
        if ".." in url.split("/"):
            return
        storage = Storage(retry_seconds=0.0)
        with reading_only(root):
            for ask in (
                storage.exists,
                storage.list_names,
                storage.size,
                storage.read,
                storage.etag,
                storage.list_files,
            ):
                with contextlib.suppress(OSError):
                    ask(url)
            with contextlib.suppress(OSError):
                storage.check(url, write=False)

    fuzz(local_places, urls.map(lambda url: url.replace("..", "")), batch=150)
