"""Variables and configuration files as shells and people leave them: AWS's, proxies, RAY_ADDRESS."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from fuzzing import Fuzz
from hypothesis import strategies as st
from mutations import damaged, texts

from jobs.cluster.address import ClusterAddress
from pipeline.access.proxies import Proxies
from pipeline.access.urls import is_web
from pipeline.store.storage import Storage

Draw = Callable[[st.SearchStrategy[Any]], Any]

DEAD = "http://127.0.0.1:9"
"""The discard port: nothing listens there, and nothing leaves this machine."""
VALUES: Mapping[str, tuple[str, ...]] = {
    "AWS_PROFILE": ("", "default", "other", "nope", "a b", "../x"),
    "AWS_ACCESS_KEY_ID": ("", "AKIAEXAMPLE", "a\u00e9"),
    "AWS_SECRET_ACCESS_KEY": ("", "secret", " "),
    "AWS_SESSION_TOKEN": ("", "token"),
    "AWS_REGION": ("", "eu-west-1", "eu west", "http://x", "x" * 300),
    "AWS_DEFAULT_REGION": ("", "us-east-1", "\u00e9"),
    "AWS_RETRY_MODE": ("", "standard", "never"),
    "AWS_MAX_ATTEMPTS": ("", "3", "0", "-1", "many"),
    "AWS_USE_FIPS_ENDPOINT": ("", "true", "maybe"),
    "AWS_USE_DUALSTACK_ENDPOINT": ("", "true", "1"),
    "AWS_CA_BUNDLE": ("", "/nonexistent.pem", "/"),
    "AWS_REQUEST_CHECKSUM_CALCULATION": ("", "when_required", "never"),
    "AWS_ENDPOINT_URL_S3": (
        "",
        DEAD,
        "127.0.0.1:9",
        "ftp://127.0.0.1",
        "http://[",
        "http://127.0.0.1:99999",
        "http://a b",
    ),
    "CONVMAE_S3_ADDRESSING": ("", "path", "sideways"),
    "CONVMAE_S3_KMS_KEY_ID": ("", "alias/x", "no key"),
    "CONVMAE_S3_REQUEST_PAYER": ("", "requester", "me"),
    "HTTP_PROXY": (
        "",
        DEAD,
        "127.0.0.1:9",
        "not a url",
        "socks5://127.0.0.1:9",
        "http://user:secret@127.0.0.1:9",
        "http://[",
    ),
    "no_proxy": ("", "*", ",", "127.0.0.1", "10.0.0.0/8,[::1]:80", "10.0.0.0/99"),
}
LINES = (
    "[default]", "[profile other]", "[profile", "[services x]", "region = eu-west-1", "region", "region = a b",
    f"endpoint_url = {DEAD}", "endpoint_url = [", "s3 =", "  addressing_style = path", "  addressing_style = sideways",
    "  use_accelerate_endpoint = true", f"  endpoint_url = {DEAD}", "services = x", "services = y",
    "aws_access_key_id = AKIAEXAMPLE", "aws_secret_access_key = secret", "credential_process = false",
    "credential_process = /nonexistent/program", "role_arn = arn:aws:iam::1:role/x", "source_profile = default",
    "source_profile = nope", "sso_session = x", "retry_mode = never", "max_attempts = many", "= x", "\u00e9 = \u00e9",
    "#",
)  # fmt: skip


@st.composite
def environments(draw: Draw) -> tuple[dict[str, str], bytes, bytes]:
    """Variables, and the contents of a config and a credentials file."""
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=4, unique=True))
    variables = {name: draw(st.sampled_from(VALUES[name])) for name in names}
    files = []
    for _ in range(2):
        text = "\n".join(draw(st.lists(st.sampled_from(LINES), max_size=6))).encode()
        files.append(draw(damaged(text, most=2)) if draw(st.integers(0, 3)) == 0 else text)
    return variables, files[0], files[1]


def test_settings_of_a_store_are_one_value_or_are_refused(fuzz: Fuzz, tmp_path: Path) -> None:
    config, credentials = tmp_path / "config", tmp_path / "credentials"

    def store_settings(given: tuple[dict[str, str], bytes, bytes]) -> None:
        variables, *contents = given
        config.write_bytes(contents[0])
        credentials.write_bytes(contents[1])
        files = {"AWS_CONFIG_FILE": str(config), "AWS_SHARED_CREDENTIALS_FILE": str(credentials)}
        environ = {**files, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path), **variables}
        with mock.patch.dict(os.environ, {**environ, "PATH": os.environ["PATH"]}, clear=True):
            storage = Storage.from_environment(environ)
            assert isinstance(storage.region, str) and storage.region
            assert (storage.key is None) == (storage.secret is None), "half a pair of keys"
            assert storage.endpoint_url is None or storage.endpoint_url.startswith(("http://", "https://"))
            assert "secret" not in repr(storage)
            # Whoever works with it gets no further than to a port on which nothing listens.
            here = replace(storage, retry_seconds=0.0, endpoint_url=storage.endpoint_url or DEAD)
            with contextlib.suppress(OSError):
                here.exists("s3://bucket/key")

    fuzz(store_settings, environments(), batch=30)


HOSTS = (
    "127.0.0.1",
    "localhost",
    "LOCALHOST",
    "[::1]",
    "[::1",
    "127.1",
    "0",
    "10.1.2.3",
    "example.org",
    "a.b.example.org.",
    "\u00e9.org",
    "",
    "a b",
    "x" * 300,
)
urls = st.tuples(
    st.sampled_from(("http://", "https://", "s3://", "HTTP://", "")),
    st.one_of(st.sampled_from(HOSTS), texts),
    st.sampled_from(("", ":80", ":0", ":99999", ":x", ":", "/a", "?b", "@c")),
).map("".join)


def test_a_url_goes_through_one_proxy_or_none_or_is_refused(fuzz: Fuzz) -> None:
    variables = st.dictionaries(st.sampled_from(("http_proxy", "HTTPS_PROXY", "ALL_PROXY")), urls, max_size=3)
    exempt = st.lists(
        st.one_of(st.sampled_from((*HOSTS, "*", ".example.org", "*.org", "10.0.0.0/8", "10.1.2.3:80")), texts),
        max_size=3,
    )

    def proxies(given: tuple[dict[str, str], list[str], str]) -> None:
        environ, entries, url = given
        if not is_web(url):  # or is refused
            return
        found = Proxies.from_environment({**environ, "NO_PROXY": ",".join(entries)}).for_url(url)
        assert found is None or found.startswith(("http://", "https://", "HTTP://"))
        if "*" in entries or "://localhost/" in url:
            assert found is None

    fuzz(proxies, st.tuples(variables, exempt, urls), batch=150)


def test_an_address_of_a_cluster_is_one_or_is_refused(fuzz: Fuzz) -> None:
    def cluster_addresses(text: str) -> None:
        address = ClusterAddress.parse(text)
        assert ClusterAddress.parse(address.text) == address, "its one spelling has another"
        assert address.text == "auto" or (address.host and 0 < address.port < 2**16)

    spelled = st.one_of(
        urls,
        st.sampled_from(
            ("auto", "AUTO", "ray://h:1", "h:6379/", "h:6379 ", "head:port", "::1:6379", "http://h:8265/x")
        ),
    )
    fuzz(cluster_addresses, spelled, batch=200)
