from __future__ import annotations

import zlib

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store.combined_crc import CRC32C, combined_crc

CRC32 = 0xEDB88320
"""The polynomial of `zlib.crc32`."""


@pytest.mark.parametrize(
    ("polynomial", "crc"), [(CRC32, zlib.crc32), (CRC32C, google_crc32c.value)], ids=["crc32", "crc32c"]
)
@given(parts=st.lists(st.binary(max_size=300), max_size=5))
def test_the_checksum_of_a_whole_follows_from_those_of_its_parts(
    polynomial: int, crc: object, parts: list[bytes]
) -> None:
    assert callable(crc)
    whole = 0
    for part in parts:
        whole = combined_crc(whole, crc(part), len(part), polynomial)

    assert whole == crc(b"".join(parts))


def test_large_parts_are_put_together_at_once() -> None:
    zeros = 5 << 30  # more than would be worth making

    assert combined_crc(combined_crc(1, 0, zeros, CRC32), 0, 0, CRC32) == combined_crc(
        combined_crc(1, 0, zeros // 2, CRC32), 0, zeros // 2, CRC32
    )
