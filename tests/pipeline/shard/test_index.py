from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DatasetError
from pipeline.shard.index import NO_LABEL, IndexRow, ShardIndex, Skipped, row_of
from pipeline.shard.index_pages import HEAD, PAGE_ROWS, Pages

NAMES = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=30)
ROWS = st.builds(
    IndexRow,
    key=NAMES,
    offset=st.integers(0, 2**50),
    length=st.integers(0, 2**40),
    crc=st.integers(0, 2**32 - 1),
    height=st.integers(1, 2**31 - 1),
    width=st.integers(1, 2**31 - 1),
    label=st.integers(-1, 2**63 - 1),
    extension=st.sampled_from(["jpg", "JPEG", "seg.png", "a-very-long-extension.webp"]),
)


def numbered(count: int, shard: str = "shard-000000", key_digits: int = 8) -> ShardIndex:
    rows = [IndexRow(f"{n:0{key_digits}d}", 512 + 1000 * n, 900, n, 20, 30, n % 7) for n in range(count)]
    return ShardIndex.from_rows(shard, 1000 * count, "digest", (), rows)


def pages(index: ShardIndex, digest: str = "") -> Pages:
    return Pages(len(index), index.table.dtype, digest or index.digest)


def decoded(pages: Pages, data: bytes, first: int, last: int) -> np.ndarray:
    start, length = pages.range(first, last)
    return np.concatenate(pages.decode(data[start : start + length], first, last, "s3://x"))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, max_size=5), etag=st.none() | NAMES, skipped=NAMES)
def test_an_index_is_read_as_it_was_written(rows: list[IndexRow], etag: str | None, skipped: str) -> None:
    index = ShardIndex.from_rows("part/0", 10**13, "digest", (Skipped(skipped, "cut"),), rows, tar_etag=etag)

    read = ShardIndex.from_bytes(index.to_bytes(), "")

    assert [read.row(place) for place in range(len(read))] == rows
    assert (read.shard, read.tar_bytes, read.sources_digest) == ("part/0", 10**13, "digest")
    assert (read.skipped, read.tar_etag, read.digest) == (index.skipped, etag, index.digest)


def test_a_name_that_is_not_utf8_keeps_its_bytes() -> None:
    name = b"caf\xe9/0001".decode("utf-8", "surrogateescape")
    index = ShardIndex.from_rows("a", 1, "", (), [IndexRow(name, 0, 1, 2, 3, 4, NO_LABEL)])

    assert ShardIndex.from_bytes(index.to_bytes(), "").row(0).member == f"{name}.jpg"
    assert index.table["key"].tolist() == [b"caf\xe9/0001"]


@pytest.mark.parametrize("count", [1, PAGE_ROWS - 1, PAGE_ROWS, PAGE_ROWS + 1, 5 * PAGE_ROWS + 3])
def test_any_pages_are_found_by_arithmetic(count: int) -> None:
    index = numbered(count)
    data = index.to_bytes()
    count_of_pages = pages(index).count

    for first in range(count_of_pages):
        for last in range(first + 1, count_of_pages + 1):
            expected = index.table[first * PAGE_ROWS : last * PAGE_ROWS]
            assert decoded(pages(index), data, first, last).tolist() == expected.tolist()


def test_rows_of_a_block_cost_kilobytes_whatever_the_shards_size() -> None:
    index = numbered(10_000)
    _, block_bytes = pages(index).range(77, 79)

    assert block_bytes < 8_000
    assert len(index.to_bytes()) > 400_000


def test_a_page_of_another_place_version_or_shard_is_refused() -> None:
    index = numbered(200)
    data = index.to_bytes()
    other_version, other_shard = numbered(199), numbered(200, "shard-000001")
    _, page_bytes = pages(index).range(0, 1)
    swapped = data[: len(HEAD)] + data[len(HEAD) + page_bytes :]

    for wrong in (other_version, other_shard):
        with pytest.raises(DatasetError, match="page 1"):
            decoded(pages(index, wrong.digest), data, 1, 2)
    with pytest.raises(DatasetError, match="page 0"):
        decoded(pages(index), swapped, 0, 1)


def test_every_flipped_byte_and_every_cut_is_found() -> None:
    data = numbered(70).to_bytes()

    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 4
        with pytest.raises(DatasetError):
            ShardIndex.from_bytes(bytes(damaged), "s3://x")
        with pytest.raises(DatasetError, match="whole"):
            ShardIndex.from_bytes(data[:place], "s3://x")


def test_an_index_of_another_version_is_refused_by_number() -> None:
    data = numbered(3).to_bytes().replace(HEAD, b"convmae index 3\n")

    with pytest.raises(DatasetError, match="must have version 2, got '3'"):
        ShardIndex.from_bytes(data, "s3://x")


def test_the_digest_sees_each_field_and_not_the_etag() -> None:
    row = IndexRow("a", 1, 2, 3, 4, 5, 6)
    digests = {
        ShardIndex.from_rows("s", 9, "d", (), [changed]).digest
        for changed in (row, *(row._replace(**{name: 7}) for name in ("offset", "length", "crc", "label", "width")))
    }

    assert len(digests) == 6
    assert ShardIndex.from_rows("s", 9, "d", (), [row], tar_etag='"etag"').digest in digests


def test_a_row_out_of_a_table_is_plain() -> None:
    row = row_of(numbered(5).table[4])

    assert row == IndexRow("00000004", 4512, 900, 4, 20, 30, 4)
    assert all(type(value) in (int, str) for value in row)
