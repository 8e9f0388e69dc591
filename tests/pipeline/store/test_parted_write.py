from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipeline.store import parted_write
from pipeline.store.parted_write import LEAST_PART_BYTES
from pipeline.store.storage import Storage

CONTENT = os.urandom(2 * LEAST_PART_BYTES + 1234)
STARTS = range(0, len(CONTENT), LEAST_PART_BYTES)


@pytest.fixture(scope="module")
def s3() -> Iterator[Storage]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    storage = Storage(f"http://{host}:{port}", "any", "any", region="us-east-1", retry_seconds=2)
    boto3.client(
        "s3", endpoint_url=storage.endpoint_url, aws_access_key_id="any", aws_secret_access_key="any"
    ).create_bucket(Bucket="bucket")
    yield storage
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Storage, str]:
    if request.param == "folder":
        return Storage(), f"{tmp_path}/deep/er"
    return request.getfixturevalue("s3"), f"s3://bucket/{tmp_path.name}"


def write_all(storage: Storage, target: parted_write.PartedWrite) -> list[parted_write.WrittenPart]:
    order = list(enumerate(STARTS, 1))
    random.Random(0).shuffle(order)
    parts = [(number, start, CONTENT[start : start + LEAST_PART_BYTES]) for number, start in order]
    return [parted_write.write_part(storage, target, *part) for part in [*parts, parts[0]]][1:]


def test_parts_in_any_order_and_repeated_make_one_object(place: tuple[Storage, str]) -> None:
    storage, folder = place
    url = f"{folder}/object"
    target = parted_write.begin(storage, url)

    parts = write_all(storage, target)
    assert not storage.exists(url)
    parted_write.finish(storage, target, parts)

    assert storage.read(url) == CONTENT
    assert storage.list_names(folder) == ["object"]


def test_what_was_there_stays_until_the_new_one_is_whole(place: tuple[Storage, str]) -> None:
    storage, folder = place
    url = f"{folder}/object"
    storage.write(url, b"before")

    parts = write_all(storage, target := parted_write.begin(storage, url))

    assert storage.read(url) == b"before"
    parted_write.finish(storage, target, parts)
    assert storage.read(url) == CONTENT


def test_what_was_never_finished_is_deleted_by_the_next(place: tuple[Storage, str]) -> None:
    storage, folder = place
    url = f"{folder}/object"
    other = parted_write.begin(storage, f"{url}-of-another-name")
    for _ in range(2):
        dead = parted_write.begin(storage, url)
        parted_write.write_part(storage, dead, 1, 0, CONTENT[:LEAST_PART_BYTES])

    parted_write.abandon_all(storage, url)

    with pytest.raises((FileNotFoundError, OSError)):
        parted_write.finish(storage, dead, [parted_write.WrittenPart(1, 0, 1, 0, "none")])
    parted_write.finish(storage, other, write_all(storage, other))
    assert storage.read(other.url) == CONTENT
    assert storage.list_names(folder) == ["object-of-another-name"]


def test_parts_are_still_there_as_they_were_written_or_not(place: tuple[Storage, str]) -> None:
    storage, folder = place
    target = parted_write.begin(storage, f"{folder}/object")
    parts = write_all(storage, target)

    assert parted_write.still_there(storage, target, parts) == parts
    parted_write.write_part(storage, target, 2, STARTS[1], bytes(LEAST_PART_BYTES))
    assert [part.number for part in parted_write.still_there(storage, target, parts)] == [
        part.number for part in parts if part.number != 2
    ]
    parted_write.abandon_all(storage, target.url)
    assert parted_write.still_there(storage, target, parts) == []


def test_stores_without_parts_are_written_as_a_stream() -> None:
    url = f"memory://{os.urandom(4).hex()}/object"

    def pieces() -> Iterator[bytes]:
        yield from (CONTENT[start : start + 1000] for start in range(0, len(CONTENT), 1000))

    assert not parted_write.takes_parts(url)
    parted_write.write_stream(Storage(), url, pieces)

    assert Storage().read(url) == CONTENT
