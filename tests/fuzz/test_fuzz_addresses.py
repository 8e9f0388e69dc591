"""URLs and paths as people write them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fuzzing import Fuzz, reading_only
from hypothesis import strategies as st
from mutations import texts

from pipeline.source import parted, suffix, within
from pipeline.storage import Storage
from pipeline.store_urls import is_local, is_s3, is_web, path_of, protocol_of, server_of

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


def test_an_address_means_one_place_or_is_refused(fuzz: Fuzz, tmp_path: Path) -> None:
    def addresses(url: str) -> None:
        protocol = protocol_of(url)
        assert [is_local(url), is_s3(url), is_web(url)].count(True) <= 1
        for made in (suffix(url), *parted(url), Storage.join(url, "x"), within("s3://bucket/root", url)):
            assert isinstance(made, str)
        with reading_only(tmp_path):
            absolute = Storage.absolute(url)
        assert Storage.absolute(absolute) == absolute
        if protocol in FREE_OF_PACKAGES:
            assert isinstance(path_of(url), str)
            assert path_of(absolute) == path_of(url)
            assert isinstance(server_of(url), tuple)
        if is_local(url):
            assert Path(absolute).is_absolute()

    fuzz(addresses, urls, batch=200)


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
