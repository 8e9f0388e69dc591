from __future__ import annotations

import pytest

from pipeline.shard.table import ShardEntry, ShardTable

ENTRIES = [
    ShardEntry("part/0", 10, 20480, "ab" * 32, 30, 4, '"etag"', "s3://elsewhere/0.tar"),
    ShardEntry("b", 0, 10240, "cd" * 32),
    ShardEntry("ü", 7, 2**40, "ef" * 32, 1, 1, None, "raw/ü.tar"),
]


def test_entries_come_back_as_they_were() -> None:
    table = ShardTable.of(ENTRIES)

    assert list(table) == ENTRIES
    assert (table[-1], table[1:], len(table)) == (ENTRIES[2], ENTRIES[1:], 3)
    assert ShardTable.from_json(table.to_json()) == table
    assert table.samples.tolist() == [10, 0, 7]


def test_columns_of_places_are_omitted_where_no_shard_has_one() -> None:
    assert {"etag", "tar"} & set(ShardTable.of(ENTRIES[1:2]).to_json()) == set()
    assert {"etag", "tar"} <= set(ShardTable.of(ENTRIES).to_json())


def test_an_empty_table_is_one() -> None:
    table = ShardTable.of([])

    assert len(table) == 0 and table.index_bytes == 0
    assert ShardTable.from_json(table.to_json()) == table


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("name", ["a", "a", "b"]),
        ("name", ["a", "b"]),
        ("name", [1, 2, 3]),
        ("samples", [1, -1, 2]),
        ("samples", ["many", 1, 2]),
        ("index_sha256", ["ab" * 31, "cd" * 33, "ef" * 32]),
        ("index_sha256", ["xy" * 32] * 3),
        ("etag", ["1"]),
    ],
)
def test_columns_that_cannot_be_are_refused(column: str, values: list[object]) -> None:
    columns = ShardTable.of(ENTRIES).to_json()

    with pytest.raises((ValueError, TypeError, AttributeError)):
        ShardTable.from_json({**columns, column: values})
